"""A call like an earlier one: the arguments of its kernel are kept, and only pointers change.

To pack them anew costs more than the arithmetic of a small loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.plain import PLAIN, Unreadable
from ...kinds import Call
from ..abi import FINE, UNREADABLE
from ..plan import Slot
from ..protocol import Engine

_empty_like = torch.empty_like
_data_ptr = Tensor.data_ptr


@dataclass(slots=True)
class Launch:
    """A kernel with all its arguments but the pointers, which `pack` makes ready."""

    run: Callable[[bytes, bytes], int]
    plan: bytes
    pack: Callable[..., bytes]


@dataclass(slots=True)
class Again:
    """A reduced loss of contiguous tensors, whose shapes and types are those of an earlier call."""

    call: Call
    engine: Engine[Any]
    inputs: int  # how many tensors there are
    learned: int  # the first so many need a gradient
    stored: int  # as many gradients forward computes
    absent: tuple[None, ...]  # the tensors that the call lacks
    undefined: tuple[None, ...]  # the gradients of those that need none
    scalar: Tensor  # what the result is like
    shapes: tuple[torch.Size, ...]  # of the tensors
    dtypes: tuple[torch.dtype, ...]
    launch: Launch
    launch_backward: Launch | None
    loss: str = ""
    apply: Any = None  # of the autograd function that bears its name

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and the gradients that forward computes; the engine says what is wrong."""
        # The gradients first: the scalar would take the front of the memory that the last ones left.
        grads = tuple(map(_empty_like, tensors[: self.stored])) if self.stored else ()
        result = _empty_like(self.scalar)
        kernel = self.launch
        pointers = map(_data_ptr, (*tensors, result, *grads))
        found = kernel.run(kernel.plan, kernel.pack(*pointers))
        if found != FINE:
            if found == UNREADABLE:
                raise Unreadable
            needed = [k < self.stored for k in range(self.inputs)]
            result, slots = self.engine.forward(self.call, self.whole(tensors), needed)
            return result, present(slots)
        return result, grads

    def fits(self, tensors: Sequence[Tensor], incoming: Tensor) -> bool:
        """Whether the tensors are what the plan says: `.data` and hooks of saved tensors may change them."""
        for tensor, dtype, shape in zip(tensors, self.dtypes, self.shapes, strict=True):
            if not (
                type(tensor) in PLAIN
                and tensor.dtype is dtype
                and tensor.shape == shape
                and tensor.is_contiguous()
                and tensor.is_cpu
                and not tensor.is_neg()
            ):
                return False
        return incoming.dtype is self.scalar.dtype and not incoming.dim()

    def backward(self, tensors: Sequence[Tensor], incoming: Tensor) -> tuple[Tensor, ...] | None:
        """The gradients, where forward computes none; None where the kernel cannot run so."""
        grads = tuple(map(_empty_like, tensors[: self.learned]))
        kernel = self.launch_backward
        assert kernel is not None
        pointers = map(_data_ptr, (*tensors, incoming, *grads))
        if kernel.run(kernel.plan, kernel.pack(*pointers)) != FINE:
            return None
        return grads

    def whole(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """With None for the tensors that the call lacks."""
        return (*tensors, *self.absent)


def present(grads: Sequence[Slot]) -> tuple[Tensor, ...]:
    return tuple(g for g in grads if g is not None)
