"""Losses of rows: what is measured along a row, then a formula of these measures.

A loss is a `Reduction`, a definition in `losses/`. From it the C++ kernel is printed
(`engines/cpu/reductions.py`), the Triton kernel is bound (`engines/gpu/reduction.py`), and torch and
mpmath run it as it is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import reduce
from . import torch_m
from .alone import lifted, lowered
from .call import WHOLE, Axes, Kind, aligned
from .formula import Functions, Pointwise, apply, rebound
from .torch_m import NAMESPACES

DEFINITIONS: dict[str, Reduction] = {}  # by name: operators of torch take no records
OPERANDS, MEASURES, NUMBERS = 3, 3, 4  # at most


def parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the positional parameters, and of the keyword-only ones."""
    found = inspect.signature(function).parameters.values()
    split = {True: [], False: []}  # type: dict[bool, list[str]]
    for p in found:
        split[p.kind is inspect.Parameter.KEYWORD_ONLY].append(p.name)
    return tuple(split[False]), tuple(split[True])


@dataclass(frozen=True, repr=False, eq=False)
class Sums:
    """Sums along a row of the terms, a tuple, that `map` gives of each place in it.

    The positional parameters of `map` are the operands, its keyword-only ones are numbers. `slope` takes
    the operands and then the derivatives of the loss by each sum, and gives those by each operand.
    """

    map: Callable[..., Any]
    slope: Callable[..., Any]

    @property
    def operands(self) -> tuple[str, ...]:
        return parameters(self.map)[0]

    @property
    def params(self) -> tuple[str, ...]:
        return parameters(self.map)[1]

    @property
    def by(self) -> tuple[str, ...]:
        return parameters(self.slope)[0][len(self.operands) :]

    @property
    def count(self) -> int:
        return len(self.by)

    @staticmethod
    def compute(operands: Sequence[Tensor]) -> torch.dtype:
        """The type to sum in."""
        return reduce.exact(operands[0])

    def along(self, operands: Sequence[Tensor], numbers: dict[str, float]) -> list[Tensor]:
        if (
            len({o.shape[-1] for o in operands}) > 1
        ):  # each term has the features of its own operands
            return [term.sum(-1) for term in self.map(*operands, **numbers)]
        given = tuple(torch.broadcast_tensors(*operands))
        return [apply(self._term(k), given, numbers).sum(-1) for k in range(self.count)]

    def _term(self, k: int) -> _Term:
        """One of the terms, with the derivatives that `slope` gives where no other has any."""
        return _Term({dtype: self._over(m, k) for dtype, m in NAMESPACES.items()})

    def _over(self, m: Any, k: int) -> Functions:
        only = [float(k == j) for j in range(self.count)]
        terms, slope = rebound(self.map, m), rebound(self.slope, m)

        def value(*operands: Tensor, **numbers: float) -> Tensor:
            term: Tensor = terms(*operands, **numbers)[k]
            return term

        def grad(*operands: Tensor, **numbers: float) -> tuple[Tensor, ...]:
            slopes = slope(*operands, *only, **numbers)
            like = operands[0]
            return tuple(
                s.expand_as(like) if isinstance(s, Tensor) else like.new_full(like.shape, s)
                for s in slopes
            )

        return Functions(value, grad, None)


class _Term(NamedTuple):
    by_torch: dict[torch.dtype, Functions]


@dataclass(frozen=True, repr=False, eq=False)
class Distances:
    """The p-norms of differences of two operands, with eps added to each coordinate.

    Of the first and the second operand, of the first and the third, of the second and the third: as many
    as `count` says. Each is 0 at distance 0, and no power leaves the range of the type.
    """

    operands: tuple[str, ...]
    count: int
    params: ClassVar[tuple[str, ...]] = ("p", "eps")
    PAIRS: ClassVar[tuple[tuple[int, int], ...]] = ((0, 1), (0, 2), (1, 2))

    @staticmethod
    def compute(operands: Sequence[Tensor]) -> torch.dtype:
        return reduce.wide(*operands)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        return self.PAIRS[: self.count]

    def along(self, operands: Sequence[Tensor], numbers: dict[str, float]) -> list[Tensor]:
        return [self._norm(operands[i] - operands[j], **numbers) for i, j in self.pairs]

    @staticmethod
    def _norm(gap: Tensor, *, p: float, eps: float) -> Tensor:
        difference = gap + eps
        if not difference.numel():
            return torch.linalg.vector_norm(difference, p, -1)
        # Of the ratio to the largest coordinate, so that no power leaves the range.
        top = difference.detach().abs().amax(-1, keepdim=True)
        top = torch.where((top > 0) & (top < torch_m.inf), top, 1)
        return torch.linalg.vector_norm(difference / top, p, -1) * top.squeeze(-1)


@dataclass(frozen=True, repr=False, eq=False)
class Reduction:
    """A loss of one row: `projection`, a formula, of what `measure` finds along it.

    The operands of `projection` are the measures, and then it may have a label: the last tensor, which has one
    number for each row. Its `grad` gives the derivatives by the measures; one of 0 stops what arrives, be
    it infinite. The numbers are those of `measure` and then those of `projection`.
    """

    name: str
    loss: str  # the public function
    measure: Sums | Distances
    projection: Pointwise
    params: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = (*self.measure.params, *self.projection.params)
        object.__setattr__(self, "params", tuple(dict.fromkeys(names)))
        DEFINITIONS[self.name] = self

    @property
    def label(self) -> str | None:
        """What the projection calls the tensor that has one number for each row."""
        names = self.projection.operands[self.measure.count :]
        return names[0] if names else None


@dataclass(slots=True, repr=False, eq=False)
class ReductionCall(Kind):
    """Tensors: two or three operands, or two and a label, or two and None. They broadcast."""

    definition: str
    numbers: tuple[float, ...]
    reduction: str
    dtype: torch.dtype
    denominator: float | None = None  # what 'mean' divides by, in place of its own count

    family: ClassVar[str] = "reduction"

    @property
    def record(self) -> Reduction:
        return DEFINITIONS[self.definition]

    @property
    def name(self) -> str:
        return self.definition

    @property
    def loss(self) -> str:
        return self.record.loss

    @property
    def gradients(self) -> int:
        """How many of the tensors the kernel differentiates by."""
        return OPERANDS - (self.record.label is not None)

    @property
    def arguments(self) -> tuple[str, ...]:
        label = self.record.label
        return (*self.record.measure.operands, *([label] if label else ()), "absent")[:OPERANDS]

    def shape(self, *tensors: Tensor | None) -> torch.Size:
        """Of the unreduced losses."""
        given = [t for t in self.split(tensors)[0] if t is not None]
        return torch.broadcast_shapes(*(t.shape for t in given))[:-1]

    def axes(self, tensors: Sequence[Any]) -> list[Axes]:
        operands, label = self.split(tensors)
        rows = self.shape(*tensors)
        found = [
            () if t is None else (*aligned(t.shape[:-1], rows), *([WHOLE] if t.dim() else []))
            for t in operands
        ]
        return [*found, *([] if label is None else [aligned(label.shape, rows)]), ()][:OPERANDS]

    def replicated(self, tensors: Sequence[Any]) -> tuple[int, int]:
        """Labels and weights; but vectors are rows of the whole."""
        return (2 if isinstance(self.record.measure, Sums) else OPERANDS), OPERANDS

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """The operands, and the label or None."""
        count = len(self.record.measure.operands)
        return tensors[:count], tensors[count] if self.record.label else None

    def by_formula(self, *tensors: Tensor) -> Tensor:
        record = self.record
        operands, label = self.split(tensors)
        if not operands[0].is_complex():
            compute = record.measure.compute(operands)
            operands = [t.to(compute) for t in operands]
        alone = operands[0].dim() < 2
        operands = [lifted(lifted(t, not t.dim()), alone) for t in operands]
        named = dict(zip(record.params, self.numbers, strict=True))
        measures = record.measure.along(operands, {n: named[n] for n in record.measure.params})
        given = (*measures, *([] if label is None else [label.to(measures[0].dtype)]))
        of_projection = {n: named[n] for n in record.projection.params}
        losses = apply(record.projection, given, of_projection)
        result = reduce.total(losses, self.reduction, self.denominator)
        return lowered(result, alone).to(self.dtype)

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(-1)
