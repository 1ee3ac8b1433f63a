"""A loss with all its settings, free of its tensors: what a kernel runs, and its formula.

There is one class for each kernel family. The tensors travel beside a call, where autograd sees
them. A call is made anew each time and never changed; to freeze the classes would triple the time
that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import formula, reduce
from .define import Pointwise
from .layout import empty_of_rows

ARGUMENTS = {"x": "input", "t": "target", "w": "pos_weight"}  # by the operands of formulas


def _lifted(tensor: Tensor, alone: bool) -> Tensor:
    """A sample that stands alone as a batch of one.

    To torch.func a number times a 0-dim tensor is of float64, and an index of 0 dimensions is a number.
    """
    return tensor.unsqueeze(0) if alone else tensor


def _lowered(result: Tensor, alone: bool) -> Tensor:
    return result.squeeze(0) if alone and result.dim() else result


@dataclass(slots=True)
class PointwiseCall:
    """Tensors: the formula's operands, then a weight or None. They broadcast."""

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
    def arguments(self) -> tuple[str, ...]:
        """What the caller calls the tensors."""
        names = (ARGUMENTS.get(name, name) for name in self.formula.operands)
        return (*names, "weight")

    @property
    def stores_gradients(self) -> bool:
        return self.reduction != "none"

    def reads(self, k: int, needed: Sequence[bool]) -> bool:
        """Whether the gradients that are needed depend on what tensor k holds."""
        return not (k == 0 and self.formula.linear and not any(needed[1:]))

    def by_formula(self, *tensors: Tensor) -> Tensor:
        *operands, weight = tensors
        alone = not any(o.dim() for o in operands)
        compute = reduce.wide(*operands)
        names = dict(zip(self.formula.params, self.params, strict=True))
        lifted = tuple(_lifted(o.to(compute), alone) for o in operands)
        losses = formula.apply(self.formula, lifted, names)
        if weight is not None:
            losses = losses * weight.to(compute)
        result = reduce.total(losses, self.reduction, self.denominator)
        return _lowered(result, alone).to(self.dtype)

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
            scale = scale / (wide[0].numel() if self.denominator is None else self.denominator)
        if weight is not None:
            scale = scale * weight.to(compute)
        slopes = zip(self.formula.grad(*wide, **names), given, needed, strict=False)
        return [(s * scale).to(t.dtype) if need else None for s, t, need in slopes]

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming


@dataclass(slots=True)
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
    arguments: ClassVar[tuple[str, ...]] = ("input", "target", "weight")

    @property
    def name(self) -> str:
        return f"rows/{self.loss}"

    @property
    def stores_gradients(self) -> bool:
        return self.loss == "cross_entropy" and self.reduction != "none"

    def reads(self, k: int, needed: Sequence[bool]) -> bool:
        """Whether the gradients that are needed depend on what tensor k holds."""
        return not (k == 0 and self.loss == "nll_loss")

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
        x = _lifted(input.to(compute), alone)
        if weight is not None:
            weight = weight.to(compute)
        if self.probabilities:
            q = _lifted(target.to(compute), alone)
            result = self._soft(formula.log_softmax(x, 1), q, weight)
        else:
            result = self._hard(x, target.reshape(1) if alone else target, weight)
        return _lowered(result, alone).to(self.dtype)

    def _soft(self, log_p: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        part = (1 - self.smoothing) * target + self.smoothing / max(log_p.shape[1], 1)
        if weight is not None:
            part = part * weight.reshape(-1, *(1,) * (log_p.dim() - 2))
        # A class without probability does not count, not even where its log-probability is -inf.
        absent = (part == 0) & (log_p == -formula.inf)
        losses = -(part * log_p.masked_fill(absent, 0)).sum(1)
        # Without classes there are no rows either: PyTorch's mean over none is NaN.
        return reduce.total(losses, self.reduction, None if log_p.shape[1] else math.nan)

    def _hard(self, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        index = target.to(torch.int64)
        counted = index != self.ignore_index
        outside = counted & ((index < 0) | (index >= x.shape[1]))
        index = index.where(counted & ~outside, 0).unsqueeze(1)
        # What an ignored row holds reaches neither the loss nor, as 0 * inf, a gradient.
        log_p = torch.where(counted.unsqueeze(1), x, 0)
        if self.loss == "cross_entropy":
            log_p = formula.log_softmax(log_p, 1)
        own = formula.gather(log_p, index).squeeze(1)
        own_weight = torch.ones_like(own) if weight is None else weight[index.squeeze(1)]
        slope = own_weight
        if self.loss == "nll_loss":  # its derivative is 0, and has a graph as PyTorch's has
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
        denominator = None
        if self.reduction == "mean":
            denominator = reduce.sum_of(torch.where(counted, own_weight, 0))
        return reduce.total(losses, self.reduction, denominator)

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(min(incoming.dim(), 1))


@dataclass(slots=True)
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
    arguments: ClassVar[tuple[str, ...]] = ("anchor", "positive", "negative")
    name: ClassVar[str] = "triplet"
    loss: ClassVar[str] = "triplet_margin_loss"

    @property
    def stores_gradients(self) -> bool:
        return self.reduction != "none"

    def reads(self, k: int, needed: Sequence[bool]) -> bool:
        """Whether the gradients that are needed depend on what tensor k holds: on all."""
        return True

    def shape(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> torch.Size:
        """Of the unreduced losses."""
        return torch.broadcast_shapes(anchor.shape, positive.shape, negative.shape)[:-1]

    def empty_gradient(self, tensor: Tensor) -> Tensor:
        """Laid out as the kernels lay out the gradient by this tensor."""
        return tensor.new_empty(tensor.shape)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        difference = a - b + self.eps
        if not difference.numel():
            return torch.linalg.vector_norm(difference, self.p, -1)
        # Of the ratio to the largest coordinate, so that no power leaves the range.
        top = difference.detach().abs().amax(-1, keepdim=True)
        top = torch.where((top > 0) & (top < formula.inf), top, 1)
        return torch.linalg.vector_norm(difference / top, self.p, -1) * top.squeeze(-1)

    def by_formula(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        if not anchor.is_complex():
            compute = reduce.wide(anchor, positive, negative)
            anchor, positive, negative = (t.to(compute) for t in (anchor, positive, negative))
        alone = anchor.dim() < 2
        anchor, positive, negative = (
            _lifted(_lifted(t, not t.dim()), alone) for t in (anchor, positive, negative)
        )
        near, far = self.distance(anchor, positive), self.distance(anchor, negative)
        if self.swap:
            far = torch.minimum(far, self.distance(positive, negative))
        losses = torch.clamp_min(self.margin + near - far, 0)
        return _lowered(reduce.total(losses, self.reduction), alone).to(self.dtype)

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(-1)


Call = PointwiseCall | RowsCall | TripletCall
