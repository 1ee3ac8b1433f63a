"""Which path a call takes, and why: the kernel for plain tensors, the formula where autograd needs it.

The formula is torch code, so whatever traces, maps or differentiates a call sees operations it knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd, cpu, ops
from .calls import Call
from .cpu.load import FLOATS

PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Route:
    """The path that a call took: `kernel` is None where the formula ran."""

    loss: str
    kernel: str | None
    why: str

    def __str__(self) -> str:
        path = f"CPU kernel {self.kernel}" if self.kernel else "formula (torch operations)"
        return f"{self.loss}: {path}, because {self.why}"


calls: Counter[tuple[str, str]] = Counter()
_trace: list[Route] | None = None


def formula_reason(*tensors: Tensor | None) -> str | None:
    """Why these tensors need the formula, or None where a kernel serves."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is tracing"
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            return f"{type(tensor).__name__} is a tensor subclass"
        if not tensor.is_cpu:
            return f"there are no kernels for {tensor.device.type} tensors"
        if tensor.layout is not torch.strided:
            return f"the layout is {tensor.layout}"
        if tensor.is_neg() or tensor.is_conj():
            return "a tensor has a lazy sign or conjugation"
    return cpu.problem()


def count_kernel(loss: str) -> None:
    """Counts a call that compiled code makes."""
    calls[loss, "kernel"] += 1


def _operator_serves(call: Call, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call that torch.compile traces becomes an operator of `ops`; an exported one does not."""
    return (
        call.family != "pointwise"
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and all(t is None or t.device.type == "cpu" for t in tensors)
        and _kernel_gap(call, tensors) is None
    )


def dispatch(
    loss: str, call: Call, tensors: tuple[Tensor | None, ...], why: str | None = None
) -> Tensor:
    """Runs the call by its kernel, or by the formula: for the reason `why`, or one found here."""
    if torch.compiler.is_compiling():
        if why is None and _operator_serves(call, tensors):
            return ops.run(call, tensors)
        return call.by_formula(*tensors)
    why = why or formula_reason(*tensors) or _kernel_gap(call, tensors)
    if why is None:
        _note(loss, call.name, "the tensors are plain CPU tensors")
        return autograd.run(call, tensors)
    _note(loss, None, why)
    return call.by_formula(*tensors)


def _kernel_gap(call: Call, tensors: tuple[Tensor | None, ...]) -> str | None:
    """What the kernels of this call cannot do, or None."""
    for tensor in tensors[call.gradients :]:
        if tensor is not None and tensor.requires_grad:
            return "a weight requires a gradient"
    for tensor in tensors:
        if tensor is None or tensor.dtype in FLOATS:
            continue
        if call.family == "rows" and tensor is tensors[1]:
            continue  # class indices
        return f"there are no kernels for {tensor.dtype}"
    return None


def _note(loss: str, kernel: str | None, why: str) -> None:
    """Counts a call, and tells `explain` of it."""
    calls[loss, "kernel" if kernel else "formula"] += 1
    if _trace is not None:
        _trace.append(Route(loss, kernel, why))


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Route:
    """The path that `function(*args, **kwargs)` takes, and why.

    `function` is a loss function or module; the call is made and its result dropped.

    Raises:
        ValueError: the call reached no loss of this library.
    """
    global _trace
    outer, _trace = _trace, []
    try:
        function(*args, **kwargs)
        routes = _trace
    finally:
        _trace = outer
    if not routes:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"explain: {name} called no loss of fusedloss")
    return routes[-1]
