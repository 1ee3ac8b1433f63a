"""A call like an earlier one: the arguments of its kernel are kept, and only pointers change.

To pack them anew costs more than the arithmetic of a small loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.plain import Unreadable
from ..abi import FINE, UNREADABLE
from ..again import Again
from ..plan import Slot

_empty_like = torch.empty_like
_data_ptr = Tensor.data_ptr


@dataclass(slots=True)
class Launch:
    """A kernel with all its arguments but the pointers, which `pack` makes ready."""

    run: Callable[[bytes, bytes], int]
    plan: bytes
    pack: Callable[..., bytes]


@dataclass(slots=True, kw_only=True)
class AgainOnCpu(Again):
    launch: Launch
    launch_backward: Launch | None

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

    def backward(self, tensors: Sequence[Tensor], incoming: Tensor) -> tuple[Tensor, ...] | None:
        """The gradients, where forward computes none; None where the kernel cannot run so."""
        grads = tuple(map(_empty_like, tensors[: self.learned]))
        kernel = self.launch_backward
        assert kernel is not None
        pointers = map(_data_ptr, (*tensors, incoming, *grads))
        if kernel.run(kernel.plan, kernel.pack(*pointers)) != FINE:
            return None
        return grads


def present(grads: Sequence[Slot]) -> tuple[Tensor, ...]:
    return tuple(g for g in grads if g is not None)
