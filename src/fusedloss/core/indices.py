"""The range of class indices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from . import errors, plain, sharded, torch_state


def readable(tensor: Tensor) -> Tensor | None:
    """The tensor if its values can be read without a sync, and while nobody traces or watches operations."""
    if torch.compiler.is_compiling() or torch_state.dispatch_modes() or torch_state.is_tracing():
        return None
    return None if not tensor.is_cpu or plain.gap(tensor) else tensor


def check_range(loss: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for the first class index out of range, where it can be read without a sync."""

    def outside(index: Tensor) -> Tensor:
        return (index != ignore_index) & ((index < 0) | (index >= classes))

    if (position := first_outside(target, outside)) is not None:
        errors.out_of_range(loss, target, position, classes, ignore_index)


def first_outside(target: Tensor, outside: Callable[[Tensor], Tensor]) -> int | None:
    """The first position whose index is outside, where it can be read without a sync, or None."""
    seen = torch_state.dispatch_modes()
    if target.is_cpu and not seen:
        target = sharded.whole(target)
    if not target.is_cpu or plain.gap(target) or torch_state.is_tracing():
        return None
    # Who watches operations sees those of the loss alone.
    with torch_state.without_modes() if seen else contextlib.nullcontext():
        found = outside(target.to(torch.int64))
        return int(found.flatten().nonzero()[0]) if found.any() else None
