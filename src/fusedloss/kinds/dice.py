"""A loss of the overlap of classes with their masks, with all its settings, and its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import reduce
from ..core.indices import check_range
from ..core.layout import empty_of_rows
from . import torch_m
from .call import CLASSES, WHOLE, Axes, Kind
from .rows import RowsCall

ACTIVATIONS = ("softmax", "sigmoid", "none")
WEIGHTINGS = ("none", "square", "simple", "uniform")  # of the classes in one overlap


class Sums(NamedTuple):
    """Of each class: of p t, of p (1 - t), of (1 - p) t and of t; (N, C), or (1, C) of a batch."""

    both: Tensor
    wrong: Tensor
    missed: Tensor
    size: Tensor


@dataclass(slots=True, repr=False, eq=False)
class DiceCall(Kind):
    """Tensors: input (N, C, ...), target (class indices or masks), and the class weight or None."""

    loss: str
    activation: str
    masks: bool
    batch: bool
    background: bool
    weighting: str
    skip_absent: bool
    ignore_index: int
    alpha: float
    beta: float
    smooth_nr: float
    smooth_dr: float
    by_overlap: float
    by_rows: float  # of cross entropy or the focal loss, where it is not 0
    gamma: float
    reduction: str
    dtype: torch.dtype
    denominator: float | None = None  # what 'mean' divides by, in place of its own count

    family: ClassVar[str] = "dice"
    gradients: ClassVar[int] = 1
    indices: ClassVar[tuple[int, ...]] = (1,)
    separable: ClassVar[bool] = False
    arguments: ClassVar[tuple[str, ...]] = ("input", "target", "weight")

    @property
    def name(self) -> str:
        return f"dice/{self.loss}"

    def shape(self, input: Tensor, *_: Any) -> torch.Size:
        """Of the unreduced losses."""
        of_images = [] if self.batch else [input.shape[0]]
        classes = (
            [] if self.weighting != "none" else [input.shape[1] - (0 if self.background else 1)]
        )
        return torch.Size(of_images + classes)

    def axes(self, tensors: Sequence[Any]) -> list[Axes]:
        """Sums are of whole images; and the means of two parts have two divisors."""
        input = tensors[0]
        if self.batch or (self.by_rows and self.reduction == "mean"):
            return Kind.axes(self, tensors)
        places = (WHOLE,) * (input.dim() - 2)
        return [
            (0, CLASSES, *places),
            (0, *((CLASSES,) if self.masks else ()), *places),
            (CLASSES,),
        ]

    def empty_gradient(self, tensor: Tensor) -> Tensor:
        """Laid out as the kernels lay out the gradient by this tensor."""
        return empty_of_rows(tensor)

    def by_formula(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        x = input.to(reduce.wide(input))
        if weight is not None:
            weight = weight.to(x.dtype)
        losses = self._of_classes(self._sums(x, target), weight)
        losses = losses[0] if self.batch else losses
        result = self.by_overlap * reduce.total(losses, self.reduction, self.denominator)
        if self.by_rows:
            result = result + self.by_rows * self.rows(x.dtype).by_formula(x, target, weight)
        return result.to(self.dtype)

    def rows(self, dtype: torch.dtype) -> RowsCall:
        """The part of each place."""
        name = "softmax_focal_loss" if self.gamma else "cross_entropy"
        return RowsCall(name, False, self.reduction, self.ignore_index, 0.0, dtype, self.gamma)

    def _sums(self, x: Tensor, target: Tensor) -> Sums:
        t, counted = self._targets(x, target)
        if not self.masks:  # what an ignored row holds reaches nothing
            x = torch.where(counted, x, 0)
        p, rest = self._probabilities(x)
        dims = [*([0] if self.batch else []), *range(2, x.dim())]
        if self.masks:
            terms = (p * t, p * (1 - t), rest * t)
        else:  # a class that is elsewhere does not know of what its places hold
            inside = t > 0
            terms = (
                torch.where(inside, p, 0),
                torch.where(inside, 0, p),
                torch.where(inside, rest, 0),
            )
        summed = terms if self.weighting == "none" else (*terms, t)
        sums = [torch.where(counted, term, 0) for term in summed]
        if dims:
            sums = [s.sum(dims, keepdim=True) for s in sums]
        both, wrong, missed, *size = (s.flatten(1)[:, 0 if self.background else 1 :] for s in sums)
        return Sums(both, wrong, missed, size[0] if size else both + missed)

    def _targets(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The masks of the classes, and what of them counts."""
        if self.masks:
            counted = target != self.ignore_index
            return torch.where(counted, target, 0).to(x.dtype), counted
        index = target.to(torch.int64).unsqueeze(1)
        classes = torch.arange(x.shape[1], device=x.device).reshape(-1, *(1,) * (x.dim() - 2))
        return (index == classes).to(x.dtype), index != self.ignore_index

    def _probabilities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p and 1 - p, both and their derivatives with their digits."""
        if self.activation == "softmax":
            log_p = torch_m.log_softmax(x, 1)
            p = log_p.exp()
            return p, torch.where(log_p < -1.0, 1 - p, torch_m.others_of(log_p))
        if self.activation == "sigmoid":
            below = x < 0
            e = torch.where(below, x, -x).exp()  # of which torch.sigmoid leaves nothing at -90
            small = e / (1 + e)
            return torch.where(below, small, 1 - small), torch.where(below, 1 - small, small)
        return x, 1 - x

    def _of_classes(self, sums: Sums, weight: Tensor | None) -> Tensor:
        apart = self.alpha * sums.wrong + self.beta * sums.missed
        both = sums.both
        if weight is not None:
            weight = weight[0 if self.background else 1 :]
        if self.weighting != "none":
            w = self._weights(sums.size)
            w = w if weight is None else w * weight
            apart, both = ((w * each).sum(1) for each in (apart, both))
        share, above = both + self.smooth_nr, apart + (self.smooth_dr - self.smooth_nr)
        below = both + apart + self.smooth_dr
        empty = below == 0
        below = torch.where(empty, 1, below)
        # Of the two quotients the lesser one, whose derivatives are no differences of near equals.
        losses = torch.where(above < share, above / below, 1 - share / below)
        losses = torch.where(empty, 0, losses)
        if self.weighting != "none":
            return losses
        if self.skip_absent:
            losses = torch.where(sums.size == 0, 0, losses)
        return losses if weight is None else losses * weight

    def _weights(self, size: Tensor) -> Tensor:
        """Of a class without elements, as much as the most that another has."""
        if self.weighting == "uniform":
            return torch.ones_like(size)
        square = self.weighting == "square"
        absent = (1 / (size * size if square else size)).isinf()
        size = torch.where(absent, 1, size)  # whose slope is finite
        w = 1 / (size * size if square else size)
        most = torch.where(absent, 0, w).amax(1, keepdim=True)
        return torch.where(absent, most, w)

    def refuses(self, tensors: Sequence[Any]) -> bool:
        return not self.masks

    def check(self, tensors: Sequence[Any]) -> None:
        if not self.masks:
            check_range(self.loss, tensors[1], tensors[0].shape[1], self.ignore_index)

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming
