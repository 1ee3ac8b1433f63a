"""A call like an earlier one: what of it stays the same. To lay it out anew takes longer than a small loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.plain import PLAIN
from ..kinds import Call
from .plan import Slots
from .protocol import Engine


@dataclass(slots=True, kw_only=True)
class Again(ABC):
    """A reduced loss of contiguous tensors, whose shapes and types are those of an earlier call."""

    call: Call
    engine: Engine[Any]
    device: torch.device
    inputs: int  # how many tensors there are
    learned: int  # the first so many need a gradient
    stored: int  # as many gradients forward computes
    absent: tuple[None, ...]  # the tensors that the call lacks
    undefined: tuple[None, ...]  # the gradients of those that need none
    scalar: Tensor  # what the result is like
    shapes: tuple[torch.Size, ...]  # of the tensors
    dtypes: tuple[torch.dtype, ...]
    loss: str = ""
    apply: Any = None  # of the autograd function that bears its name

    @abstractmethod
    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Slots]:
        """The loss, and what the engine's forward gives beside it."""

    def fits(self, tensors: Sequence[Tensor], incoming: Tensor) -> bool:
        """Whether the tensors are what the plan says: `.data` and hooks of saved tensors may change them."""
        for tensor, dtype, shape in zip(tensors, self.dtypes, self.shapes, strict=True):
            if not (
                type(tensor) in PLAIN
                and tensor.dtype is dtype
                and tensor.shape == shape
                and tensor.device == self.device
                and tensor.is_contiguous()
                and not tensor.is_neg()
            ):
                return False
        return incoming.dtype is self.scalar.dtype and not incoming.dim()

    def whole(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """With None for the tensors that the call lacks."""
        return (*tensors, *self.absent)


def common(
    call: Call, inputs: Sequence[Tensor], slots: int, learned: int, stored: int, result: Tensor
) -> dict[str, Any]:
    """What an `Again` says of its call on every device: of `slots` tensors `inputs` are there."""
    return {
        "call": call,
        "device": inputs[0].device,
        "inputs": len(inputs),
        "learned": learned,
        "stored": stored,
        "absent": (None,) * (slots - len(inputs)),
        "undefined": (None,) * (len(inputs) - learned),
        "scalar": result,
        "shapes": tuple(t.shape for t in inputs),
        "dtypes": tuple(t.dtype for t in inputs),
    }
