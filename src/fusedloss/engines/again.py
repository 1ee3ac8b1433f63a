"""A call like an earlier one: what of it stays the same. To lay it out anew takes longer than a small loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kinds import Call
from .plan import Slot
from .protocol import Engine


@dataclass(slots=True, kw_only=True)
class Again(ABC):
    """A loss of tensors whose shapes, strides and types are those of an earlier call; it holds no values."""

    call: Call
    engine: Engine[Any]
    # Of the tensors: what waits for backward, and then the loss. Nothing where it could not run.
    forward: Callable[..., tuple[Slot, ...] | None]
    inputs: int  # how many tensors there are
    needed: tuple[bool, ...]  # by which of the call's first tensors gradients are wanted
    learned: int  # by how many
    stores: bool  # whether forward computes the gradients
    absent: tuple[None, ...]  # the tensors that the call lacks
    undefined: tuple[None, ...] | None  # the gradients after those, if these are first, and no sums
    broadcast: tuple[torch.Size, ...] | None  # the shapes of the gradients, where they are sums
    shape: torch.Size  # of the result
    device: torch.device
    shapes: tuple[torch.Size, ...]  # of the tensors
    loss: str = ""
    apply: Any = None  # of the autograd function that bears its name

    @abstractmethod
    def told(self, tensors: Sequence[Tensor]) -> tuple[Slot, ...]:
        """What `forward` gives, by all means."""

    def whole(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """With None for the tensors that the call lacks."""
        return (*tensors, *self.absent)

    def returned(self, grads: Sequence[Tensor]) -> tuple[Slot, ...]:
        """What backward returns: the gradients that are needed, each of its tensor's shape and in its place."""
        if self.undefined is not None:
            return (None, *grads, *self.undefined)
        if self.broadcast is not None:
            pairs = zip(grads, self.broadcast, strict=True)
            grads = [g if g.shape == shape else g.sum_to_size(shape) for g, shape in pairs]
        return (None, *self.slots(grads), *(None,) * (self.inputs - len(self.needed)))

    def kept(self, stored: Sequence[Slot]) -> Sequence[Slot]:
        """What forward gave beside the loss, as the engine's forward gives it."""
        return self.slots(stored)

    def slots(self, grads: Sequence[Slot]) -> tuple[Slot, ...]:
        """With None for those that nothing needs."""
        found = iter(grads)
        return tuple(next(found) if need else None for need in self.needed)


def common(
    call: Call,
    inputs: Sequence[Tensor],
    slots: int,
    needed: Sequence[bool],
    stores: bool,
    result: Tensor,
    broadcast: tuple[torch.Size, ...] | None = None,
) -> dict[str, Any]:
    """What an `Again` says of its call on every device: of `slots` tensors `inputs` are there."""
    needed = tuple(needed[: len(inputs)])
    learned = sum(needed)
    first = broadcast is None and all(needed[:learned])
    return {
        "call": call,
        "inputs": len(inputs),
        "needed": needed,
        "learned": learned,
        "stores": bool(learned) and stores,
        "absent": (None,) * (slots - len(inputs)),
        "undefined": (None,) * (len(inputs) - learned) if first else None,
        "broadcast": broadcast,
        "shape": result.shape,
        "device": result.device,
        "shapes": tuple(t.shape for t in inputs),
    }
