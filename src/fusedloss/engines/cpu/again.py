"""A call like an earlier one: the arguments of its kernel are kept, and only pointers change.

To pack them anew costs more than the arithmetic of a small loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from ...core import torch_state
from ...core.plain import Unreadable, gap, is_plain
from ..abi import FINE
from ..again import Again
from ..plan import Slot

_empty = torch_state.empty_on_cpu
_data_ptr = Tensor.data_ptr
_storage = torch_state.storage
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
LAYOUTS = 4  # of what arrives in backward


Launch = Callable[..., "tuple[Tensor, ...] | None"]  # what it made; None where something was wrong
Values = tuple[Sequence[Tensor], tuple[float, ...]] | None  # what a kernel reads, and its divisor


def launch(
    run: Callable[[bytes, bytes], int],
    plan: bytes,
    pack: Callable[..., bytes],
    made: tuple[Layout, ...],
) -> Launch:
    """A kernel with all its arguments but pointers: of tensors, and of what it writes to and is `made` anew."""

    def launch(*tensors: Tensor) -> tuple[Tensor, ...] | None:
        outputs = tuple(starmap(_empty, made))
        found = run(plan, pack(*map(_data_ptr, (*tensors, *outputs))))
        return outputs if found == FINE else None

    return launch


def launch_of_values(
    run: Callable[[bytes, bytes], int],
    plan: bytes,
    pack: Callable[..., bytes],
    made: tuple[Layout, ...],
    values: Callable[[Sequence[Tensor], float], Values],
    over: bool,
) -> Launch:
    """The same where the kernel reads copies of the tensors, or is given a divisor: counted, or given first."""

    def launch(*given: Any) -> tuple[Tensor, ...] | None:
        found = values(given[1:], given[0]) if over else values(given, 0.0)
        if found is None:
            return None
        read, divisor = found
        outputs = tuple(starmap(_empty, made))
        code = run(plan, pack(*map(_data_ptr, (*read, *outputs)), *divisor))
        return outputs if code == FINE else None

    return launch


@dataclass(slots=True, kw_only=True)
class AgainOnCpu(Again):
    engine: Any
    # By what arrives: the kernel of the gradients, or None where there is none.
    backwards: list[tuple[Callable[..., bool], Launch | None]] = field(default_factory=list)
    number: float = 0.0  # that a mean is over; 0: its own count

    def over(self, number: float) -> AgainOnCpu:
        """The same of a mean over another number."""
        return replace(self, call=replace(self.call, denominator=number), number=number)

    def told(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What forward made by the engine, which says what is wrong."""
        if not all(map(_storage, tensors)):
            raise Unreadable
        needed = self.needed if self.stores else ()
        result, slots = self.engine.forward(self.call, self.whole(tensors), needed)
        return (*present(slots), result)

    def backward(self, tensors: Sequence[Tensor], incoming: Tensor) -> tuple[Tensor, ...] | None:
        """The gradients, where forward computes none; None where the kernel cannot run so."""
        launch = self.arriving(tensors, incoming)
        over = (self.number,) if self.number else ()
        return launch and launch(*over, *tensors, incoming)

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
        whole, over = self.whole(tensors), bool(self.number)
        made = self.engine.keep_backward(self.call, whole, self.needed, incoming, over)
        self.backwards.append((torch_state.alike(*tensors, incoming), made))
        return made


def present(grads: Sequence[Slot]) -> tuple[Tensor, ...]:
    return tuple(g for g in grads if g is not None)
