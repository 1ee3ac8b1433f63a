"""The triplet margin loss with all its settings, and its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import reduce
from . import torch_m
from .alone import lifted, lowered
from .call import Kind


@dataclass(slots=True)
class TripletCall(Kind):
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
        top = torch.where((top > 0) & (top < torch_m.inf), top, 1)
        return torch.linalg.vector_norm(difference / top, self.p, -1) * top.squeeze(-1)

    def by_formula(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        if not anchor.is_complex():
            compute = reduce.wide(anchor, positive, negative)
            anchor, positive, negative = (t.to(compute) for t in (anchor, positive, negative))
        alone = anchor.dim() < 2
        anchor, positive, negative = (
            lifted(lifted(t, not t.dim()), alone) for t in (anchor, positive, negative)
        )
        near, far = self.distance(anchor, positive), self.distance(anchor, negative)
        if self.swap:
            far = torch.minimum(far, self.distance(positive, negative))
        losses = torch.clamp_min(self.margin + near - far, 0)
        return lowered(reduce.total(losses, self.reduction), alone).to(self.dtype)

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(-1)
