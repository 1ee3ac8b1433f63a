"""A loss over a linear head with all its settings, and its formula: logits in full, by torch operations.

The tensors that travel beside a call, N rows of D features, C classes and K heads of them:
input (N, D), linear_weight (C, K, D), linear_bias (C, K), target (N, K) or (N, C, K), weight (C),
sample_weight (N, K), denominator (); all but the first, the second and the target may be None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .. import reduce
from ..calls import RowsCall

Slot = Tensor | None
Slots = tuple[Slot, ...]


class Rows(NamedTuple):
    """What is known of each row, (N, K); the last three only where statistics are asked for."""

    loss: Tensor
    lse: Slot = None
    entropy: Slot = None
    correct: Slot = None  # 1 where no class is above the target's

    def each(self, f: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(f(self.loss), *(None if t is None else f(t) for t in self[1:]))


@dataclass(slots=True)
class LinearCall:
    loss: str
    probabilities: bool
    reduction: str
    ignore_index: int
    smoothing: float
    z_loss: float
    softcap: float  # 0: none
    logit_scale: float
    statistics: bool
    memory_budget: int  # 0: the default
    chunk_rows: int  # the most rows a chunk; 0: as many as the budget holds
    dtype: torch.dtype  # of the result

    family: ClassVar[str] = "linear"
    logits: ClassVar[int] = 1  # of each row and class, in a chunk
    gradients: ClassVar[int] = 4  # by the first four tensors, unless the target is of indices

    def by_formula(self, *tensors: Slot) -> tuple[Tensor, ...]:
        input, linear_weight, linear_bias, target, weight, *_ = tensors
        assert input is not None and linear_weight is not None and target is not None
        classes, heads = linear_weight.shape[:2]
        bias = None if linear_bias is None else linear_bias.flatten()
        x = F.linear(input, linear_weight.flatten(0, 1), bias).reshape(-1, classes, heads)
        return self.results(self.rows(x.to(reduce.wide(x)), target, weight), tensors)

    def rows(self, x: Tensor, target: Tensor, weight: Slot) -> Rows:
        """From the logits (N, C, K), in the type to compute in."""
        x = x * self.logit_scale if self.logit_scale != 1 else x
        x = self.softcap * torch.tanh(x / self.softcap) if self.softcap else x
        rows = RowsCall(
            "cross_entropy", self.probabilities, "none", self.ignore_index, self.smoothing, x.dtype
        )
        losses = rows.by_formula(x, target, weight)
        if not (self.z_loss or self.statistics):
            return Rows(losses)
        counted = self.counted(target)
        if counted is not None:
            x = torch.where(counted.unsqueeze(1), x, 0)
        lse = x.logsumexp(1)
        if self.z_loss:
            losses = losses + self.z_loss * _where(counted, lse.square())
        if not self.statistics:
            return Rows(losses)
        entropy = lse - (x.softmax(1) * x).sum(1)
        index = target.to(torch.int64).clamp(0, x.shape[1] - 1).unsqueeze(1)
        correct = (x.gather(1, index).squeeze(1) == x.amax(1)).to(x.dtype)
        return Rows(losses, *(_where(counted, t) for t in (lse, entropy, correct)))

    def counted(self, target: Slot) -> Slot:
        """Which rows are not ignored; None where all count."""
        return None if self.probabilities or target is None else target != self.ignore_index

    def scale(self, tensors: Slots, incoming: Slot = None) -> Slot:
        """What each row's loss counts in the result, (N, K) or (); None where that is 1."""
        sample_weight = tensors[5]
        scale = sample_weight if incoming is None else incoming
        if incoming is not None and sample_weight is not None:
            scale = incoming * sample_weight
        if self.reduction == "mean":
            return (1 if scale is None else scale) / self.divisor(tensors)
        return scale

    def divisor(self, tensors: Slots) -> Tensor:
        """What 'mean' divides by."""
        input, linear_weight, _, target, weight, _, denominator = tensors[:7]
        assert input is not None and linear_weight is not None
        if denominator is not None:
            return denominator
        counted = self.counted(target)
        if counted is None:
            rows = input.shape[0] * linear_weight.shape[1]
            return torch.full((), rows, device=input.device)
        if weight is None or target is None:
            return counted.sum()
        index = target.to(torch.int64).clamp(0, max(weight.shape[0] - 1, 0))
        return torch.where(counted, weight[index], 0).sum()

    def results(self, rows: Rows, tensors: Slots) -> tuple[Tensor, ...]:
        """What the call returns: the loss, or with statistics those of each row."""
        if self.statistics:
            return tuple(t.to(self.dtype) for t in rows if t is not None)
        sample_weight = tensors[5]
        losses = rows.loss if sample_weight is None else rows.loss * sample_weight
        divisor = self.divisor(tensors) if self.reduction == "mean" else None
        return (reduce.total(losses, self.reduction, divisor).to(self.dtype),)


def _where(counted: Slot, values: Tensor) -> Tensor:
    return values if counted is None else torch.where(counted, values, 0)
