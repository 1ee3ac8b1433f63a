"""Calls like earlier ones: the checks cost more than the arithmetic of a small loss, and shapes repeat."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core import errors, levels, plain, torch_state, trace
from ..core.plain import PLAIN
from ..engines import gpu
from ..engines.gpu import available
from ..kinds import Call

MOST, ALIKE = 1024, 8  # keys, and calls of a key
OVER = "over"  # in the key of calls with a denominator
CONSTANTS = (str, bool, int, float, type, type(None))
Tensors = tuple[Any, ...]

# Asked at every call: bound here once.
_is_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
_hooks = torch_state.saved_tensor_hooks
_storage = torch_state.storage
_level = levels.level
_by_kernel = trace.by_kernel


class Asked(NamedTuple):
    """A call, as its function was asked: the settings, and the tensors that there are."""

    settings: tuple[Any, ...]
    tensors: Tensors
    make: Callable[[Tensors], Tensors] | None = None  # the tensors of the kernel, if others
    warning: str = ""  # to be said each time
    over: bool = False  # whether a number was given that the mean is over


@dataclass(slots=True, repr=False, eq=False)
class Known:
    """A call that ran a kernel, and how to run it again."""

    alike: Callable[..., bool]  # whether the tensors are like its own
    call: Call
    absent: tuple[None, ...]  # the tensors that the call lacks
    make: Callable[[Tensors], Tensors] | None
    warning: str
    on_gpu: bool
    prepare: Callable[..., Callable[..., Tensor] | None] | None  # None: there is a repeater
    unplanned: Callable[..., Tensor] | None  # runs the call where there is no plan, or none serves
    repeater: Callable[..., Tensor] | None = None  # made when the call first comes back
    tried: bool = False
    run: Callable[..., Tensor] | None = None  # that, where there is nothing else to do


known: dict[tuple[Any, ...], tuple[Known, ...]] = {}


def repeat(loss: str, settings: tuple[Any, ...], tensors: Tensors) -> Tensor | None:
    """The loss, if `dispatch` ran a kernel for such tensors and these settings before, else None.

    What is known holds all that the checks depend on, and the route of a plain call, and the arguments of its
    kernels; but no value of a tensor.
    """
    if _is_compiling() or forward_ad._current_level >= 0 or _level() or trace.watched:
        return None
    try:
        found = known[loss, settings, _grad_enabled(), available.host, tensors[0].shape]
    except (KeyError, TypeError, AttributeError):  # without hash or shape: for the checks to refuse
        return None
    for it in found:
        if it.alike(*tensors):
            break
    else:
        return None
    run = it.run
    if run is None or _hooks(True) is not None:
        return _with_more(loss, it, tensors)
    _by_kernel[loss] += 1
    try:
        return run(*tensors)
    except plain.Unreadable:
        _by_kernel[loss] -= 1
        return None


def repeat_over(
    loss: str, settings: tuple[Any, ...], tensors: Tensors, denominator: Any
) -> Tensor | None:
    """The same of a mean over a number, if there is one, which is no part of what is known."""
    if denominator is None:
        return repeat(loss, settings, tensors)
    if _is_compiling() or forward_ad._current_level >= 0 or _level() or trace.watched:
        return None
    try:
        found = known[loss, (OVER, *settings), _grad_enabled(), available.host, tensors[0].shape]
    except (KeyError, TypeError, AttributeError):
        return None
    number = plain.number_of(denominator)
    if not number or math.isnan(number):
        return None
    it = next((each for each in found if each.alike(*tensors)), None)
    return None if it is None else _with_more(loss, it, tensors, number)


def _with_more(loss: str, it: Known, tensors: Tensors, *over: float) -> Tensor | None:
    """The same where the call first comes back, has no plan, is on a GPU, warns, or converts its tensors.

    And where what is saved for backward may come back as anything.
    """
    if it.unplanned is None and _hooks(True) is not None:
        return None
    if it.make or not (it.tried and it.repeater):
        # Where memory was freed, torch's own operations would end the process.
        if not all(map(_storage, tensors)):
            return None
        if it.make:
            tensors = it.make(tensors)
        if it.prepare and not it.tried:
            it.repeater, it.tried = it.prepare(loss, it.call, (*tensors, *it.absent)), True
            if not (it.make or it.warning or it.on_gpu):
                it.run = it.repeater
    if it.on_gpu and gpu.problem(it.call.family):
        return None
    if it.warning:
        errors.warn(it.warning)
    _by_kernel[loss] += 1
    try:
        if it.repeater is not None and _hooks(True) is None:
            return it.repeater(*over, *tensors)
        if it.unplanned is not None:
            return it.unplanned(loss, it.call, (*tensors, *it.absent))
    except gpu.Failed as failed:
        gpu.turn_off(failed, it.call.family)
    except plain.Unreadable:
        pass
    _by_kernel[loss] -= 1
    return None


def remember(
    loss: str,
    call: Any,
    asked: Asked,
    made: Tensors,
    prepare: Callable[..., Callable[..., Tensor] | None],
    unplanned: Callable[..., Tensor] | None,
) -> None:
    """The call of the kernel may be repeated: the checks saw nothing but types and shapes."""
    tensors, make, warning = asked.tensors, asked.make, asked.warning
    if not all(type(t) in PLAIN for t in tensors):
        return
    present = tuple(t for t in made if t is not None)
    if make is None:
        make = conversion(tensors, present)
    absent = (None,) * (len(made) - len(present))
    alike, on_gpu = torch_state.alike(*tensors), gpu.serves(tensors[0])
    keep(loss, asked, Known(alike, call, absent, make, warning, on_gpu, prepare, unplanned))


def keep(loss: str, asked: Asked, it: Known) -> None:
    """A call that was asked so is repeated, where its settings are all that they are."""
    settings, tensors = asked.settings, asked.tensors
    if asked.over:
        settings = (OVER, *settings)
    if (
        not all(type(s) in CONSTANTS for s in settings)  # a tensor's value may change
        or "elementwise_mean" in settings  # which warns each time
    ):
        return
    key = loss, settings, _grad_enabled(), available.host, tensors[0].shape
    if len(known) >= MOST:
        known.clear()
    known[key] = (it, *known.get(key, ())[: ALIKE - 1])


def conversion(given: Tensors, made: Tensors) -> Callable[[Tensors], Tensors] | None:
    """How the tensors of a kernel are made of those that were given: of other types, shapes or devices."""
    if all(m is g for m, g in zip(made, given, strict=True)):
        return None
    steps = [None if m is g else _step(g, m) for m, g in zip(made, given, strict=True)]

    def make(tensors: Tensors) -> Tensors:
        pairs = zip(steps, tensors, strict=True)
        return tuple(t if step is None else step(t) for step, t in pairs)

    return make


def _step(given: Tensor, made: Tensor) -> Callable[[Tensor], Tensor]:
    device, dtype, shape = made.device, made.dtype, made.shape
    reshaped, same = shape != given.shape, made.numel() == given.numel()
    detached = given.requires_grad and not made.requires_grad

    def step(tensor: Tensor) -> Tensor:
        found = (tensor.detach() if detached else tensor).to(device, dtype)
        return (found.reshape(shape) if same else found.expand(shape)) if reshaped else found

    return step
