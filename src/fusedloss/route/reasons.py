"""Why a call takes the kernel, or the formula.

The formula is torch code: whatever traces, maps or differentiates it sees operations it knows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import plain, torch_state, trace
from ..engines import abi, cpu, gpu
from ..engines.cpu.load import FLOATS
from . import modes


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
    return _unbuilt(call, tensors[0])


def _unbuilt(call: Any, first: Tensor | None) -> str | None:
    """Why there are no kernels on the device, or None."""
    if call.everywhere and not (first is not None and first.is_cpu):
        return None
    return gpu.problem(call.family) if gpu.serves(first) else cpu.problem()


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
        and _unbuilt(call, tensors[0]) is None
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


def by_formula(call: Any, tensors: tuple[Any, ...]) -> Any:
    return call.by_formula(*tensors)
