"""Calls like earlier ones: the checks cost more than the arithmetic of a small loss, and shapes repeat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..autograd import functions as autograd
from ..core import levels, plain, torch_state, trace
from ..core.plain import PLAIN
from ..engines import gpu
from ..engines.gpu import available
from ..kinds import Call

MOST = 1024
HOST = gpu.HOST
CONSTANTS = (str, bool, int, float, type)

# Asked at every call: bound here once.
_transforms_active = torch_state.transforms_active
_dispatch_modes = torch_state.dispatch_modes
_is_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
_inference = torch.is_inference_mode_enabled
_any_autocast = torch_state.any_autocast
_autocast = torch.is_autocast_enabled
_strided = torch.strided
_storage = torch_state.storage
_level = levels.level
_by_kernel = trace.by_kernel

known: dict[tuple[Any, ...], tuple[Call, Any]] = {}
_untried: Any = object()  # in place of a plan: one is made when the call first comes back


def repeat(
    loss: str, tensors: tuple[Any, ...], settings: tuple[Any, ...], keep: Call | None = None
) -> Tensor | None:
    """The loss, if `dispatch` ran a kernel for such tensors and these `settings` before, else None.

    The tensors are those of the call, two or more; the last may be None. The key holds all that the checks
    depend on, and the route of a plain call, and the arguments of its kernels. With `keep`, that is the call
    to run the next time, and nothing runs now.
    """
    if (
        _is_compiling()
        or _transforms_active()
        or _dispatch_modes()
        or forward_ad._current_level >= 0
        or _level()
        or trace.watched
    ):
        return None
    a, b = tensors[0], tensors[1]
    if not (
        type(a) in PLAIN
        and type(b) in PLAIN
        and a.layout is _strided
        and b.layout is _strided
        and not (a.is_neg() or b.is_neg())
    ):
        return None
    host = a.is_cpu
    device = available.host if host else a.get_device()
    if not (b.is_cpu if host else a.is_cuda and b.is_cuda and b.get_device() == device):
        return None
    key: tuple[Any, ...]
    # fmt: off
    learns = _grad_enabled() and not _inference()
    key = (loss, settings, device, _any_autocast() and _autocast("cpu" if host else "cuda"),
           a.dtype, a.shape, a.is_contiguous(), learns and a.requires_grad,
           b.dtype, b.shape, b.is_contiguous(), learns and b.requires_grad)
    # fmt: on
    for c in tensors[2:] if tensors[-1] is not None or len(tensors) > 3 else ():
        if c is None:
            continue
        if not (
            type(c) in PLAIN
            and c.layout is _strided
            and (c.is_cpu if host else c.is_cuda and c.get_device() == device)
            and not c.is_neg()
        ):
            return None
        key += c.dtype, c.shape, c.is_contiguous(), learns and c.requires_grad
    if keep:
        if len(known) >= MOST:
            known.clear()
        known[key] = keep, _untried
        return None
    try:
        call, again = known[key]
    except (KeyError, TypeError):  # a setting without a hash is for the checks to refuse
        return None
    # What is packed is looked at here, and later by the kernel.
    if (again is _untried or again is None) and not all(t is None or _storage(t) for t in tensors):
        return None
    if again is _untried:
        again = autograd.prepare(loss, call, tensors)
        known[key] = call, again
    if device != HOST and gpu.problem(call.family):
        return None
    _by_kernel[loss] += 1
    try:
        return autograd.repeat(again, tensors) if again else autograd.run(loss, call, tensors)
    except gpu.Failed as failed:
        gpu.turn_off(failed, call.family)
    except plain.Unreadable:
        pass
    _by_kernel[loss] -= 1
    return None


def remember(loss: str, call: Call, tensors: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
    """The call may be repeated: the checks saw nothing but types and shapes."""
    if (
        not all(type(s) in CONSTANTS for s in settings)  # a tensor's value may change
        or "elementwise_mean" in settings  # which warns each time
        # torch.jit.trace makes each size a tensor, which no key holds: so nothing without sizes is kept.
        or not all(t is None or t.dim() for t in tensors)
    ):
        return
    repeat(loss, tensors, settings, keep=call)
