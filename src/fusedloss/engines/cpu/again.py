"""A call like an earlier one: the arguments of its kernel are kept, and only pointers change.

To pack them anew costs more than the arithmetic of a small loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from ...core import torch_state
from ...core.plain import Unreadable, gap, is_plain
from ..abi import FINE, UNREADABLE
from ..again import Again
from ..plan import Slot

_empty = torch_state.empty_on_cpu
_data_ptr = Tensor.data_ptr
_storage = torch_state.storage
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
LAYOUTS = 4  # of what arrives in backward


@dataclass(slots=True)
class Launch:
    """A kernel with all its arguments but those that `pack` makes ready: pointers, and a counted divisor."""

    run: Callable[[bytes, bytes], int]
    plan: bytes
    pack: Callable[..., bytes]
    made: tuple[Layout, ...]  # of what it writes to


@dataclass(slots=True, kw_only=True)
class AgainOnCpu(Again):
    engine: Any
    launch: Launch
    copies: bool  # whether the kernel reads copies of tensors, such as a weight of another type
    counted: int  # of how many elements some count; 0 where the divisor does not depend on values
    # By what arrives: the kernel of the gradients, or None where there is none.
    backwards: list[tuple[Callable[..., bool], Launch | None]] = field(default_factory=list)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and the gradients that forward computes; the engine says what is wrong."""
        # The gradients first: the scalar would take the front of the memory that the last ones left.
        made = tuple(starmap(_empty, self.launch.made))
        found = self.start(self.launch, tensors, made)
        if found != FINE:
            if found == UNREADABLE:
                raise Unreadable
            needed = self.needed if self.stores else ()
            result, slots = self.engine.forward(self.call, self.whole(tensors), needed)
            return result, present(slots)
        return made[-1], made[:-1]

    def backward(self, tensors: Sequence[Tensor], incoming: Tensor) -> tuple[Tensor, ...] | None:
        """The gradients, where forward computes none; None where the kernel cannot run so."""
        launch = self.arriving(tensors, incoming)
        if launch is None:
            return None
        made = tuple(starmap(_empty, launch.made))
        return made if self.start(launch, tensors, (incoming, *made)) == FINE else None

    def start(self, launch: Launch, tensors: Sequence[Tensor], others: tuple[Tensor, ...]) -> int:
        """What the kernel returns. The `others` are what arrives, if anything does, and what is written to."""
        if not (self.copies or self.counted):
            return launch.run(launch.plan, launch.pack(*map(_data_ptr, (*tensors, *others))))
        if not all(map(_storage, tensors)):
            return UNREADABLE  # which torch's operations would read, and end the process
        whole, quotients = self.whole(tensors), ()
        if self.counted:
            quotients = self.engine.quotients(self.call, whole, self.counted)
        read = present(self.engine.plan(self.call, whole, ()).read()) if self.copies else tensors
        return launch.run(launch.plan, launch.pack(*map(_data_ptr, (*read, *others)), *quotients))

    def arriving(self, tensors: Sequence[Tensor], incoming: Tensor) -> Launch | None:
        """The kernel of the gradients for what arrives in such a layout; `.data` may have changed tensors."""
        for alike, launch in self.backwards:
            if alike(*tensors, incoming):
                return launch
        if (
            len(self.backwards) >= LAYOUTS
            or not is_plain(incoming)
            or incoming.shape != self.shape
            or any(t.shape != s or gap(t) for t, s in zip(tensors, self.shapes, strict=True))
        ):
            return None
        made: Launch | None
        made = self.engine.keep_backward(self.call, self.whole(tensors), self.needed, incoming)
        self.backwards.append((torch_state.alike(*tensors, incoming), made))
        return made


def present(grads: Sequence[Slot]) -> tuple[Tensor, ...]:
    return tuple(g for g in grads if g is not None)
