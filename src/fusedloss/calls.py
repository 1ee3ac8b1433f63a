"""A loss with all its settings, free of its tensors: what a kernel runs, and the formula of the same.

There is one class for each kernel family. The tensors travel beside a call, so that autograd sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import formula, reduce
from .define import Pointwise


@dataclass(frozen=True, slots=True)
class PointwiseCall:
    """Tensors: the formula's operands, then a weight or None. Operands broadcast; so does the weight."""

    formula: Pointwise
    params: tuple[float, ...]
    reduction: str
    denominator: Tensor | float | None  # of 'mean'; the number of losses where None
    dtype: torch.dtype  # of the result

    family: ClassVar[str] = "pointwise"
    gradients: ClassVar[int] = 2  # how many of the tensors the kernel differentiates by

    @property
    def name(self) -> str:
        return f"pointwise/{self.formula.name}"

    @property
    def stores_gradients(self) -> bool:
        return self.reduction != "none"

    def by_formula(self, *tensors: Tensor) -> Tensor:
        *operands, weight = tensors
        compute = reduce.wide(*operands)
        names = dict(zip(self.formula.params, self.params, strict=True))
        losses = formula.apply(self.formula, tuple(o.to(compute) for o in operands), names)
        if weight is not None:
            losses = losses * weight.to(compute)
        return reduce.total(losses, self.reduction, self.denominator).to(self.dtype)

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming


@dataclass(frozen=True, slots=True)
class RowsCall:
    """Tensors: input, target (class indices or probabilities), and the class weight or None."""

    loss: str
    probabilities: bool
    reduction: str
    ignore_index: int
    smoothing: float
    dtype: torch.dtype

    family: ClassVar[str] = "rows"
    gradients: ClassVar[int] = 2

    @property
    def name(self) -> str:
        return f"rows/{self.loss}"

    @property
    def stores_gradients(self) -> bool:
        return self.loss == "cross_entropy" and self.reduction != "none"

    def shape(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> torch.Size:
        """Of the unreduced losses."""
        if not self.probabilities:
            return target.shape
        return input.shape[: min(input.dim() - 1, 1)] + input.shape[2:]

    def by_formula(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        compute = reduce.wide(input, target) if self.probabilities else reduce.wide(input)
        x = input.to(compute)
        if weight is not None:
            weight = weight.to(compute)
        if self.loss == "cross_entropy":
            x = x.log_softmax(0 if x.dim() == 1 else 1)
        if self.probabilities:
            result = self._soft(x, target.to(compute), weight)
        else:
            result = self._hard(x, target, weight)
        return result.to(self.dtype)

    def _soft(self, log_p: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        axis = 0 if log_p.dim() == 1 else 1
        part = (1 - self.smoothing) * target + self.smoothing / log_p.shape[axis]
        if weight is not None:
            part = part * weight.reshape(-1, *(1,) * (log_p.dim() - axis - 1))
        # A class without probability does not count, not even where its log-probability is -inf.
        absent = (part == 0) & (log_p == -formula.inf)
        losses = -(part * log_p.masked_fill(absent, 0)).sum(axis)
        return reduce.total(losses, self.reduction)

    def _hard(self, log_p: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        axis = 0 if log_p.dim() == 1 else 1
        index = target.to(torch.int64)
        if log_p.dim() == 1:
            index = index.reshape(())  # PyTorch takes a target of shape (1) too
        counted = index != self.ignore_index
        index = index.where(counted, 0).unsqueeze(axis)
        own = log_p.gather(axis, index).squeeze(axis)
        own_weight = torch.ones_like(own) if weight is None else weight[index.squeeze(axis)]
        losses = -own_weight * own
        if self.smoothing > 0:
            spread = log_p if weight is None else log_p * weight.reshape(
                -1, *(1,) * (log_p.dim() - axis - 1)
            )
            losses = (1 - self.smoothing) * losses - self.smoothing / log_p.shape[axis] * spread.sum(axis)
        losses = torch.where(counted, losses, 0)
        denominator = torch.where(counted, own_weight, 0).sum() if self.reduction == "mean" else None
        return reduce.total(losses, self.reduction, denominator).reshape(
            target.shape if self.reduction == "none" else ()
        )

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(min(incoming.dim(), 1))


@dataclass(frozen=True, slots=True)
class TripletCall:
    """Tensors: anchor, positive, negative. They broadcast."""

    margin: float
    p: float
    eps: float
    swap: bool
    reduction: str
    dtype: torch.dtype

    family: ClassVar[str] = "triplet"
    gradients: ClassVar[int] = 3
    name: ClassVar[str] = "triplet"
    loss: ClassVar[str] = "triplet_margin_loss"

    @property
    def stores_gradients(self) -> bool:
        return self.reduction != "none"

    def shape(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> torch.Size:
        """Of the unreduced losses."""
        return torch.broadcast_shapes(anchor.shape, positive.shape, negative.shape)[:-1]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a - b + self.eps, self.p, -1)

    def by_formula(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        if not anchor.is_complex():
            compute = reduce.wide(anchor, positive, negative)
            anchor, positive, negative = (t.to(compute) for t in (anchor, positive, negative))
        near, far = self.distance(anchor, positive), self.distance(anchor, negative)
        if self.swap:
            far = torch.minimum(far, self.distance(positive, negative))
        losses = torch.clamp_min(self.margin + near - far, 0)
        return reduce.total(losses, self.reduction).to(self.dtype)

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(-1)


Call = PointwiseCall | RowsCall | TripletCall
