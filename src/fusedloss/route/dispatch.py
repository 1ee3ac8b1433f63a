"""Which path a call takes, and why: the kernel for plain tensors, the formula for the rest.

The formula is torch code: whatever traces, maps or differentiates it sees operations it knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..autograd import functions as autograd
from ..autograd import operators as ops
from ..core import errors, plain, sharded, torch_state, trace
from ..core.indices import check_range
from ..core.plain import PLAIN
from ..engines import abi, cpu, gpu
from ..engines.cpu.load import FLOATS
from ..kinds import Call
from ..kinds.rows import RowsCall
from .memo import remember

if TYPE_CHECKING:
    from ..kinds.heads import LinearCall


def formula_reason(
    call: Call | LinearCall, tensors: tuple[Tensor | None, ...], by_operator: bool = False
) -> str | None:
    """Why this call needs the formula, or None where a kernel serves: `by_operator` under a dispatch mode."""
    if trace.force:
        return trace.force
    if torch_state.transforms_active():
        return "a torch.func transform is active"
    if torch_state.forward_mode():
        return "forward-mode differentiation is active"
    if torch_state.dispatch_modes() and not by_operator:
        return "a TorchDispatchMode is active"
    if torch_state.is_tracing():
        return "torch.jit.trace is tracing"
    for tensor in tensors:
        if tensor is None:
            continue
        if why := plain.gap(tensor):
            return why
    on_gpu = gpu.serves(tensors[0])
    why = _kernel_gap(call, tensors, on_gpu)
    if why or tensors[0] is None:  # a linear loss elsewhere: torch operations serve as well
        return why
    return gpu.problem(call.family) if on_gpu else cpu.problem()


def _operator_serves(call: Call, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a traced call becomes an operator of `ops`; an exported one does not."""
    return (
        call.family != "pointwise"
        and not torch_state.is_exporting()
        and not torch_state.transforms_active()
        and all(
            t is None or (t.device.type in ("cpu", "cuda") and not sharded.is_sharded(t))
            for t in tensors
        )
        and not (tensors[0] is not None and tensors[0].is_cuda and gpu.problem(call.family))
        and _kernel_gap(call, tensors, gpu.serves(tensors[0])) is None
    )


def dispatch(
    loss: str,
    call: Call,
    tensors: tuple[Any, ...],
    why: str | None = None,
    settings: tuple[Any, ...] | None = None,
) -> Tensor:
    """Runs the call by its kernel, or by the formula: for the reason `why`, or one found here.

    With `settings`, `repeat` may do so again: the checks saw nothing else but types and shapes.
    """
    if torch.compiler.is_compiling():
        if why is None and _operator_serves(call, tensors):
            return ops.run(call, tensors)
        return by_formula(call, tensors)
    why = why or formula_reason(call, tensors)
    if why is None:
        device = "GPU" if gpu.serves(tensors[0]) else "CPU"
        trace.note(loss, call.name, f"the tensors are plain {device} tensors", device)
        if settings is not None:
            remember(loss, call, tensors, settings)
        try:
            return autograd.run(loss, call, tensors)
        except gpu.Failed as failed:
            gpu.turn_off(failed, call.family)
            why = str(gpu.problem(call.family))
    plain.check(loss, **dict(zip(call.arguments, tensors, strict=True)))
    trace.note(loss, None, why)
    tensors = _made_dense(loss, call.arguments[0], tensors)
    if isinstance(call, RowsCall) and not call.probabilities:
        input, target, _ = tensors
        classes = input.shape[min(input.dim() - 1, 1)]
        check_range(loss, target, classes, call.ignore_index)
    return autograd.spanned(loss, lambda: by_formula(call, tensors))


def by_formula(call: Call, tensors: tuple[Any, ...]) -> Tensor:
    """Plain class indices and weights, such as a criterion's buffers, count as replicated beside DTensors."""
    first = 1 if isinstance(call, RowsCall) and not call.probabilities else call.gradients
    return sharded.run(call.by_formula, tensors, first, len(tensors))


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


def _kernel_gap(
    call: Call | LinearCall, tensors: tuple[Tensor | None, ...], on_gpu: bool
) -> str | None:
    """What the kernels of this call cannot do, or None."""
    indices = 1 if call.family == "rows" else None  # the tensor that may hold class indices
    for k, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS and k != indices:
            return f"there are no kernels for {tensor.dtype}"
        if tensor.dim() > abi.MAX_DIMS:
            return f"there are no kernels for more than {abi.MAX_DIMS} dimensions"
        if k >= call.gradients and tensor.requires_grad:
            return "a weight requires a gradient"
        if on_gpu and not tensor.numel():
            return "there is nothing to compute"
    return None
