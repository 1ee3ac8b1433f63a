"""A loss of rows of classes by the margins of their labels: with all its settings, and its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import errors, reduce
from ..core.indices import refuse_first
from .alone import lifted
from .call import CLASSES, Axes, Kind
from .torch_m import inf


@dataclass(slots=True, repr=False, eq=False)
class MarginCall(Kind):
    """Tensors: input (N, C), (C) or (), target, and the class weight or None.

    The target holds one class a row, (N), (1) or (); with `sets`, labels in the input's shape, of which
    the first -1 in a row is the end.
    """

    loss: str
    sets: bool
    squared: bool
    margin: float
    reduction: str
    dtype: torch.dtype
    denominator: float | None = None  # what 'mean' divides by, in place of its own count

    family: ClassVar[str] = "margins"
    gradients: ClassVar[int] = 1
    indices: ClassVar[tuple[int, ...]] = (1,)
    arguments: ClassVar[tuple[str, ...]] = ("input", "target", "weight")

    @property
    def name(self) -> str:
        return f"margins/{self.loss}"

    @property
    def least(self) -> int:
        """The least number that a target may hold."""
        return -1 if self.sets else 0

    def shape(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> torch.Size:
        """Of the unreduced losses."""
        return input.shape[:-1] if self.sets else target.shape

    def axes(self, tensors: Sequence[Any]) -> list[Axes]:
        input, target, _ = tensors
        rows: Axes = (0,) if input.dim() > 1 else ()
        of_input = (*rows, CLASSES)[: input.dim()]
        of_target = of_input if self.sets else rows
        if len(of_target) != target.dim():  # one row
            of_target = (None,) * target.dim()
        return [of_input, of_target, (CLASSES,)]

    def by_formula(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        compute = reduce.exact(input) if self.sets else reduce.wide(input)
        shape = self.shape(input, target)
        x = lifted(lifted(input.to(compute), not input.dim()), input.dim() < 2)
        rows, classes = x.shape
        index = target.to(torch.int64).reshape(rows, classes if self.sets else 1)
        outside = (index < self.least) | (index >= classes)
        losses = (self._of_sets if self.sets else self._of_classes)(x, index, ~outside) / classes
        if weight is not None:
            losses = losses * weight.to(compute)[index.where(~outside, 0).squeeze(1)]
        # On the CPU labels were checked; elsewhere NaN says so, and no device-side assertion.
        losses = losses.masked_fill(outside.any(1), float("nan"))
        total = reduce.total(losses.reshape(shape), self.reduction, self.denominator)
        return total.to(self.dtype)

    def _of_classes(self, x: Tensor, index: Tensor, inside: Tensor) -> Tensor:
        index = index.where(inside, 0)
        gaps = self.margin + (x - x.gather(1, index))
        own = index == torch.arange(x.shape[1], device=x.device)
        terms = gaps.masked_fill((gaps <= 0) | own, 0)
        return (terms * terms if self.squared else terms).sum(1)

    def _of_sets(self, x: Tensor, index: Tensor, inside: Tensor) -> Tensor:
        """Of each label, how many classes pass it and their sum: from sorted ones, for no tensor of N C C."""
        kept = inside & ((index == -1).long().cumsum(1) == 0)
        index = index.where(kept, 0)
        labels = torch.zeros_like(x).scatter_add(1, index, kept.to(x.dtype)) > 0
        others = x.masked_fill(labels, -inf).sort(1, descending=True).values
        counted = torch.nn.functional.pad(others.masked_fill(others == -inf, 0).cumsum(1), (1, 0))
        own = x.gather(1, index)
        # NaN passes every other, and is passed by them.
        rising, edge = (
            (-others).nan_to_num(-inf, inf, -inf),
            (self.margin - own).nan_to_num(inf, inf, -inf),
        )
        passing = torch.searchsorted(rising.contiguous(), edge.contiguous())
        losses = counted.gather(1, passing) + passing * (self.margin - own)
        return losses.masked_fill(~kept | (passing == 0), 0).sum(1)

    def check(self, tensors: Sequence[Any]) -> None:
        input, target, _ = tensors
        classes = input.shape[-1] if input.dim() else 1
        refuse_first(
            target,
            lambda y: (y < self.least) | (y >= classes),
            lambda target, at: errors.label_out_of_range(self.loss, target, at, classes, self.sets),
        )

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(-1)
