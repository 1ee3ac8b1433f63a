"""A pointwise loss with all its settings, and its formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ..core import errors, reduce, sharded, torch_state
from .alone import lifted, lowered
from .call import Axes, Kind, aligned
from .formula import Pointwise, apply

LEAST = 1 << 19  # elements: of fewer Inductor's own loops take less time than an operator
ARGUMENTS = {"x": "input", "t": "target", "w": "pos_weight"}  # by the operands of formulas


@dataclass(slots=True, repr=False, eq=False)
class PointwiseCall(Kind):
    """Tensors: the formula's operands, then a weight or None. They broadcast."""

    formula: Pointwise
    params: tuple[float, ...]
    reduction: str
    parts: int | None  # how many losses 'mean' counts; all where None
    dtype: torch.dtype  # of the result
    by_weights: bool = False  # 'mean' divides by the sum of the weights
    ignored: float | None = None  # the target of elements that 'mean' does not count
    loss: str = ""
    denominator: float | None = None  # what 'mean' divides by, in place of its own count

    family: ClassVar[str] = "pointwise"
    of_nothing: ClassVar[float] = math.nan

    def compiles(self, tensors: Sequence[Any]) -> bool:
        """Reduced losses of many elements: others Inductor fuses with what they are made of, at less cost."""
        return (
            self.reduction != "none"
            and all(t is None or t.device.type == "cpu" for t in tensors)
            and torch_state.is_large(tensors[0].numel(), LEAST)
        )

    @property
    def name(self) -> str:
        return f"pointwise/{self.formula.name}"

    @property
    def cpu_gap(self) -> str | None:
        return None if self.formula.built else "its formula is none of those that were built"

    @property
    def gradients(self) -> int:
        """How many of the tensors the kernel differentiates by: the first ones."""
        return self.formula.derivatives

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the caller calls the tensors."""
        names = (ARGUMENTS.get(name, name) for name in self.formula.operands)
        return (*names, "weight")

    def reads(self, k: int, needed: Sequence[bool]) -> bool:
        """Whether the gradients that are needed depend on what tensor k holds."""
        return not (k == 0 and self.formula.linear and not any(needed[1:]))

    @property
    def counts(self) -> bool:  # type: ignore[override]
        return (
            self.reduction == "mean"
            and self.denominator is None
            and (self.ignored is not None or self.by_weights)
        )

    def divisor(self, tensors: Sequence[Any]) -> Tensor | float | None:
        """What 'mean' divides by; the number of losses where None."""
        if not self.counts:
            return self.parts if self.denominator is None else self.denominator
        if self.ignored is not None:
            return reduce.count_other(tensors[1], self.ignored)
        return reduce.sum_of(tensors[-1])

    def shape(self, *tensors: Tensor | None) -> torch.Size:
        """Of the unreduced losses."""
        return torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))

    def axes(self, tensors: Sequence[Any]) -> list[Axes]:
        whole = self.shape(*tensors)
        return [() if t is None else aligned(t.shape, whole) for t in tensors]

    def losses(self, tensors: Sequence[Any]) -> float | None:
        if self.denominator is not None or self.parts is None:
            return Kind.losses(self, tensors)
        return float(self.parts)

    def counter(self, tensors: Sequence[Any]) -> int | None:
        if not self.counts:
            return None
        return len(tensors) - 1 if self.ignored is None else 1

    def count(self, tensors: Sequence[Any]) -> Tensor:
        found = self.divisor(tensors)
        assert isinstance(found, Tensor)
        return found

    def replicated(self, tensors: Sequence[Any]) -> tuple[int, int]:
        return 2, len(tensors)  # such as the weights that a criterion holds

    def by_formula(self, *tensors: Tensor) -> Tensor:
        *operands, weight = tensors
        alone = not any(o.dim() for o in operands)
        compute = reduce.wide(*operands)
        names = dict(zip(self.formula.params, self.params, strict=True))
        given = tuple(lifted(o.to(compute), alone) for o in operands)
        losses = apply(self.formula, given, names)
        if weight is not None:
            losses = losses * weight.to(compute)
        result = reduce.total(losses, self.reduction, self.divisor(tensors))
        return lowered(result, alone).to(self.dtype)

    def gradients_by_formula(
        self, tensors: Sequence[Tensor | None], needed: Sequence[bool], incoming: Tensor
    ) -> list[Tensor | None]:
        """Those of the operands, by the formula's own gradient; of the shape that all broadcast to."""
        *operands, weight = tensors
        given = [t for t in operands if t is not None]
        compute = reduce.wide(*given)
        names = dict(zip(self.formula.params, self.params, strict=True))
        wide = torch.broadcast_tensors(*(t.to(compute) for t in given))
        scale = incoming.to(compute)
        if self.reduction == "mean":
            divisor = self.divisor(tensors)
            scale = scale / (wide[0].numel() if divisor is None else divisor)
        if weight is not None:
            scale = scale * weight.to(compute)
        slopes = zip(
            self.formula.by_torch[compute].grad(*wide, **names), given, needed, strict=False
        )
        return [(s * scale).to(t.dtype) if need else None for s, t, need in slopes]

    def refuses(self, tensors: Sequence[Any]) -> bool:
        return self.formula.domain is not None

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming

    def empty_gradient(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    def refuse(self, tensors: Sequence[Any]) -> NoReturn:
        """Tells of the first element outside of the formula's domain."""
        formula, operands = self.formula, tensors[:-1]
        assert formula.domain is not None and formula.refuse is not None
        spread = torch.broadcast_tensors(*map(sharded.whole, operands))
        named = dict(zip(formula.params, self.params, strict=True))
        at = int((~formula.domain(*spread, **named)).flatten().nonzero()[0])
        told = (spread[k].flatten()[at].item() for k in formula.told)
        formula.refuse(errors.position(at, spread[0].shape), *told)
