"""Which path a call takes, and why: the kernel for plain tensors, the formula for the rest.

The formula is torch code: whatever traces, maps or differentiates it sees operations it knows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..autograd import functions as autograd
from ..autograd import operators
from ..core import errors, plain, reduce, sharded, torch_state, trace
from ..core.plain import PLAIN
from ..engines import abi, cpu, gpu
from ..engines.cpu.load import FLOATS
from ..kinds import Call
from . import modes, shards
from .memo import Asked, remember


def formula_reason(call: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why this call needs the formula, or None where a kernel serves."""
    if trace.force:
        return trace.force
    if torch_state.transforms_active():
        return "a torch.func transform is active"
    if torch_state.forward_mode():
        return "forward-mode differentiation is active"
    if why := _mode_gap(call, tensors):
        return why
    if torch_state.is_tracing():
        return "torch.jit.trace is tracing"
    if why := plain.first_gap(tensors, call.everywhere) or _kernel_gap(call, tensors):
        return why
    if call.everywhere and not (tensors[0] is not None and tensors[0].is_cpu):
        return None
    return gpu.problem(call.family) if gpu.serves(tensors[0]) else cpu.problem()


def _mode_gap(call: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why an active dispatch mode, which sees every operation of torch, needs the formula."""
    if not torch_state.dispatch_modes():
        return None
    if call.hides and modes.gap() is None and operator_serves(call, tensors):
        return None
    return "a TorchDispatchMode is active"


def operator_serves(call: Any, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a traced call becomes an operator of torch; an exported one does not."""
    return (
        not torch_state.is_exporting()
        and not torch_state.transforms_active()
        and all(t is None or t.device.type in ("cpu", "cuda") for t in tensors)
        and (call.everywhere or not (tensors[0].is_cuda and gpu.problem(call.family)))  # type: ignore[union-attr]
        and _kernel_gap(call, tensors) is None
        and call.compiles(tensors)
    )


def _kernel_gap(call: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """What the kernels of this call cannot do, or None."""
    on_gpu = gpu.serves(tensors[0])
    if why := call.gpu_gap if on_gpu else call.cpu_gap:
        return str(why)
    for k, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if k >= call.gradients and tensor.requires_grad:
            return "a weight requires a gradient"
        if call.everywhere and not (tensor.is_cpu and tensor.is_floating_point()):
            continue
        if tensor.dtype not in FLOATS and k not in call.indices:
            return f"there are no kernels for {tensor.dtype}"
        if tensor.dim() > abi.MAX_DIMS:
            return f"there are no kernels for more than {abi.MAX_DIMS} dimensions"
        if on_gpu and not (tensor.numel() or call.everywhere):
            return "there is nothing to compute"
    return None


def dispatch(
    loss: str,
    call: Call,
    tensors: tuple[Any, ...],
    why: str | None = None,
    asked: Asked | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Runs the call by its kernel, or by the formula: for the reason `why`, or one found here.

    What was `asked`, if that is given, `repeat` may do again: the checks saw nothing else but types and shapes.
    'mean' divides by the `denominator`, if one is given; such a call is not repeated.
    """
    if denominator is not None:
        return _divided(loss, call, tensors, why, denominator)
    if sharded.among(tensors):
        return shards.run(
            loss,
            call,
            tensors,
            lambda own, local: (dispatch(loss, own, local, why),),
            lambda: check_whole(call, tensors),
        )[0]
    if torch_state.is_compiling():
        if why is None and operator_serves(call, tensors):
            return operators.run(call, tensors)[0]
        return by_formula(call, tensors)
    why = why or formula_reason(call, tensors)
    if why is None:
        device = "GPU" if gpu.serves(tensors[0]) else "CPU"
        trace.note(loss, call.name, f"the tensors are plain {device} tensors", device)
        if asked is not None:
            remember(loss, call, asked, tensors)
        try:
            return autograd.run(loss, call, tensors)
        except gpu.Failed as failed:
            gpu.turn_off(failed, call.family)
            why = str(gpu.problem(call.family))
    plain.check(loss, **dict(zip(call.arguments, tensors, strict=True)))
    trace.note(loss, None, why)
    tensors = _made_dense(loss, call.arguments[0], tensors)
    call.check(tensors)
    return autograd.spanned(loss, lambda: by_formula(call, tensors))


def _divided(
    loss: str,
    call: Call,
    tensors: tuple[Any, ...],
    why: str | None,
    denominator: Tensor | float,
) -> Tensor:
    """A mean over another number than the call's count: by the call, where that can be read for nothing."""
    if number := _read(denominator):
        return dispatch(loss, replace(call, denominator=number), tensors, why)
    exact = reduce.exact(tensors[0])
    total = dispatch(loss, replace(call, denominator=1.0, dtype=exact), tensors, why)
    if isinstance(denominator, Tensor):
        denominator = sharded.beside(loss, "denominator", denominator.to(exact), total)
    return (total / denominator).to(call.dtype)


def _read(denominator: Tensor | float) -> float:
    """The number; 0 where it is that, is differentiated by, or is of a graph or of another device."""
    if torch_state.is_compiling() or torch_state.transforms_active():
        return 0.0
    if isinstance(denominator, Tensor):
        learns = denominator.requires_grad or torch_state.forward_mode() or torch_state.is_tracing()
        if learns or not (denominator.is_cpu and plain.is_plain(denominator)):
            return 0.0
        denominator = denominator.item()
    return float(denominator)


def check_whole(call: Any, tensors: tuple[Any, ...]) -> None:
    """Refuses class indices out of range in DTensors, by their positions in the whole; collective."""
    call.check(tuple(sharded.whole(t) if k in call.indices else t for k, t in enumerate(tensors)))


def by_formula(call: Any, tensors: tuple[Any, ...]) -> Any:
    return call.by_formula(*tensors)


def _made_dense(loss: str, first: str, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """PyTorch's losses take sparse targets, some of them, but no sparse input."""
    if type(tensors[0]) in PLAIN and tensors[0].layout is not torch.strided:
        words = (
            f"{first} has layout {tensors[0].layout}, which no loss takes: pass {first}.to_dense()"
        )
        errors.fail(NotImplementedError, loss, words)
    return tuple(
        t.to_dense() if type(t) in PLAIN and t.layout is not torch.strided else t for t in tensors
    )
