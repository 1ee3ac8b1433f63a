"""The range of class indices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from . import errors, plain, torch_state


def readable(tensor: Tensor) -> Tensor | None:
    """The tensor if its values can be read without a sync, and while nobody traces or watches operations."""
    if torch_state.is_compiling() or torch_state.dispatch_modes() or torch_state.is_tracing():
        return None
    return None if not tensor.is_cpu or plain.gap(tensor) else tensor


def check_range(loss: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for the first class index out of range, where it can be read without a sync."""
    refuse_first(
        target,
        lambda index: (index != ignore_index) & ((index < 0) | (index >= classes)),
        lambda target, at: errors.out_of_range(loss, target, at, classes, ignore_index),
    )


def refuse_first(
    target: Tensor, outside: Callable[[Tensor], Tensor], refuse: Callable[[Tensor, int], NoReturn]
) -> None:
    """Refuses the first position whose index is outside, where it can be read without a sync."""
    seen = torch_state.dispatch_modes()
    if not target.is_cpu or plain.gap(target) or torch_state.is_tracing():
        return
    # Who watches operations sees those of the loss alone, and not what is asked for the message.
    with torch_state.without_modes() if seen else contextlib.nullcontext():
        found = outside(target.to(torch.int64))
        if found.any():
            refuse(target, int(found.flatten().nonzero()[0]))
