"""A loss of rows of classes with all its settings, and its formula: cross entropy, focal, likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import reduce, torch_state
from ..core.indices import check_range
from ..core.layout import empty_of_rows
from . import torch_m
from .alone import lifted, lowered
from .call import CLASSES, Axes, Kind


def axes_of_rows(input: Tensor) -> Axes:
    """Of (N, C, d1, ...), or of the classes of one row."""
    return (0, CLASSES, *range(1, input.dim() - 1)) if input.dim() > 1 else (CLASSES,)


@dataclass(slots=True, repr=False, eq=False)
class RowsCall(Kind):
    """Tensors: input, target (class indices or probabilities), and the class weight or None."""

    loss: str
    probabilities: bool
    reduction: str
    ignore_index: int
    smoothing: float
    dtype: torch.dtype
    gamma: float = 0.0  # of the focal loss; 0 is cross entropy
    denominator: float | None = None  # what 'mean' divides by, in place of its own count

    family: ClassVar[str] = "rows"
    gradients: ClassVar[int] = 2
    indices: ClassVar[tuple[int, ...]] = (1,)
    arguments: ClassVar[tuple[str, ...]] = ("input", "target", "weight")

    @property
    def name(self) -> str:
        return f"rows/{self.loss}"

    @property
    def softmax(self) -> bool:
        """Whether the input holds logits."""
        return self.loss != "nll_loss"

    @property
    def stores_gradients(self) -> bool:
        return self.softmax and self.reduction != "none"

    def reads(self, k: int, needed: Sequence[bool]) -> bool:
        """Whether the gradients that are needed depend on what tensor k holds."""
        return self.softmax or k != 0

    def shape(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> torch.Size:
        """Of the unreduced losses."""
        if not self.probabilities:
            return target.shape if input.dim() > 1 else input.shape[:0]
        return input.shape[: min(input.dim() - 1, 1)] + input.shape[2:]

    def empty_gradient(self, tensor: Tensor) -> Tensor:
        """Laid out as the kernels lay out the gradient by this tensor."""
        return empty_of_rows(tensor)

    def by_formula(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        compute = reduce.wide(input, target) if self.probabilities else reduce.wide(input)
        alone = input.dim() == 1
        x = lifted(input.to(compute), alone)
        if weight is not None:
            weight = weight.to(compute)
        if self.probabilities:
            q = lifted(target.to(compute), alone)
            result = self._soft(torch_m.log_softmax(x, 1), q, weight)
        else:
            result = self._hard(x, target.reshape(1) if alone else target, weight)
        return lowered(result, alone).to(self.dtype)

    def _soft(self, log_p: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        part = (1 - self.smoothing) * target + self.smoothing / max(log_p.shape[1], 1)
        if weight is not None:
            part = part * weight.reshape(-1, *(1,) * (log_p.dim() - 2))
        # A class without probability does not count, not even where its log-probability is -inf.
        absent = (part == 0) & (log_p == -torch_m.inf)
        losses = -(part * log_p.masked_fill(absent, 0)).sum(1)
        denominator = self.denominator
        if denominator is None and not log_p.shape[1]:
            denominator = math.nan  # without classes there are no rows: PyTorch's mean over none
        return reduce.total(losses, self.reduction, denominator)

    def _hard(self, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        index = target.to(torch.int64)
        counted = index != self.ignore_index
        outside = counted & ((index < 0) | (index >= x.shape[1]))
        index = index.where(counted & ~outside, 0).unsqueeze(1)
        # What an ignored row holds reaches neither the loss nor, as 0 * inf, a gradient.
        log_p = torch.where(counted.unsqueeze(1), x, 0)
        if self.softmax:
            log_p = self._focused(torch_m.log_softmax(log_p, 1))
        own = log_p.gather(1, index).squeeze(1)
        own_weight = torch.ones_like(own) if weight is None else weight[index.squeeze(1)]
        slope = own_weight
        if not self.softmax:  # its derivative is 0, and has a graph as PyTorch's has
            slope = torch.where(torch.zeros_like(counted), own, own_weight)
        losses = -slope * own
        if self.smoothing > 0:
            spread = log_p
            if weight is not None:
                spread = log_p * weight.reshape(-1, *(1,) * (log_p.dim() - 2))
            flat = self.smoothing / max(log_p.shape[1], 1)
            losses = (1 - self.smoothing) * losses - flat * spread.sum(1)
        # On the CPU the index was checked; elsewhere NaN says so, and no device-side assertion.
        losses = torch.where(counted, losses.masked_fill(outside, float("nan")), 0)
        denominator: Tensor | float | None = self.denominator
        if self.reduction == "mean" and denominator is None:
            denominator = reduce.sum_of(torch.where(counted, own_weight, 0))
        return reduce.total(losses, self.reduction, denominator)

    def _focused(self, log_p: Tensor) -> Tensor:
        """(1 - p)^gamma log p; the power is 1 where p is 0, and 0 with derivatives of 0 where p is 1."""
        if self.gamma == 0:
            return log_p
        inside = (log_p < 0) & (log_p > -torch_m.inf)
        rest = torch_m.others_of(torch.where(inside, log_p, -1.0))
        power = torch.where(inside, rest.pow(self.gamma), (log_p < 0).to(log_p.dtype))
        return torch.where(log_p == 0, 0.0, power * log_p)

    def refuses(self, tensors: Sequence[Any]) -> bool:
        return not self.probabilities

    def check(self, tensors: Sequence[Any]) -> None:
        if not self.probabilities:
            input, target, _ = tensors
            classes = input.shape[min(input.dim() - 1, 1)]
            check_range(self.loss, target, classes, self.ignore_index)

    def divided(self) -> tuple[int, ...]:
        # A graph takes the sums of a likelihood's shards for no operator of ours.
        gathers = self.gamma or (not self.softmax and torch_state.is_compiling())
        return () if gathers else (0, 1)

    def replicated(self, tensors: Sequence[Any]) -> tuple[int, int]:
        return 2 if self.probabilities else 1, len(tensors)

    def axes(self, tensors: Sequence[Any]) -> list[Axes]:
        input, target, _ = tensors
        of_input = axes_of_rows(input)
        of_rows = tuple(a for a in of_input if a != CLASSES)
        of_target = of_input if self.probabilities else of_rows
        return [of_input, of_target or (None,) * target.dim(), (CLASSES,)]

    def losses(self, tensors: Sequence[Any]) -> float | None:
        input, found = tensors[0], Kind.losses(self, tensors)
        # Without classes there are no rows either: PyTorch's mean over none is NaN.
        return found if found is None or input.shape[min(input.dim() - 1, 1)] else math.nan

    def counter(self, tensors: Sequence[Any]) -> int | None:
        return None if self.probabilities or self.denominator is not None else 1

    def count(self, tensors: Sequence[Any]) -> Tensor:
        _, target, weight = tensors
        index = target.to(torch.int64)
        counted = index != self.ignore_index
        if weight is None:
            return torch.count_nonzero(counted).to(reduce.exact(target))
        own = weight[index.clamp(0, max(weight.shape[0] - 1, 0))]
        return reduce.sum_of(torch.where(counted, own, 0))

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(min(incoming.dim(), 1))
