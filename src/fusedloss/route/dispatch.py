"""Which path a call takes, and why: the kernel for plain tensors, the formula for the rest.

The formula is torch code: whatever traces, maps or differentiates it sees operations it knows.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from ..autograd import functions as autograd
from ..autograd import operators as ops
from ..core import errors, levels, plain, sharded
from ..core.plain import PLAIN
from ..engines import abi, cpu, gpu
from ..engines.cpu.again import Again
from ..engines.cpu.load import FLOATS
from ..kinds import Call
from ..kinds.rows import RowsCall

if TYPE_CHECKING:
    from ..kinds.heads import LinearCall

MOST_KNOWN = 1024
CONSTANTS = (str, bool, int, float, type)

# Asked at every call: bound here once.
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_is_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
_inference = torch.is_inference_mode_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_autocast = torch.is_autocast_enabled
_strided = torch.strided
_storage = plain.storage
_level = levels.level


@dataclass(frozen=True)
class Route:
    """The path that a call took: `kernel` is None where the formula ran."""

    loss: str
    kernel: str | None
    why: str
    device: str = "CPU"

    def __str__(self) -> str:
        path = (
            f"{self.device} kernel {self.kernel}" if self.kernel else "formula (torch operations)"
        )
        return f"{self.loss}: {path}, because {self.why}"


# By loss: a Counter, or keys of two words, would take twice the time.
_by_kernel: defaultdict[str, int] = defaultdict(int)
_by_formula: defaultdict[str, int] = defaultdict(int)
_trace: list[Route] | None = None
_forced: str | None = None
_known: dict[tuple[Any, ...], tuple[Call, Again | None]] = {}
_untried: Any = object()  # in place of an Again: one is made when the call first comes back


@contextlib.contextmanager
def forced(why: str) -> Iterator[None]:
    """Inside, every call takes the formula, for the reason `why`."""
    global _forced
    before, _forced = _forced, why
    try:
        yield
    finally:
        _forced = before


def repeat(
    loss: str, tensors: tuple[Any, ...], settings: tuple[Any, ...], keep: Call | None = None
) -> Tensor | None:
    """The loss, if `dispatch` ran a kernel for such tensors and these `settings` before, else None.

    The checks cost more than the arithmetic of a small loss, and a training loop repeats its shapes. The key
    holds all that they depend on, and the route of a plain call, and the arguments of its kernels.
    With `keep`, that is the call to run the next time, and nothing runs now.
    """
    if (
        _is_compiling()
        or _transforms_active()
        or _dispatch_modes()
        or forward_ad._current_level >= 0
        or _level()
        or _forced
        or _trace is not None
    ):
        return None
    a, b, c = tensors
    if not (
        type(a) in PLAIN
        and type(b) in PLAIN
        and a.layout is _strided
        and b.layout is _strided
        and not (a.is_neg() or b.is_neg())
    ):
        return None
    host = a.is_cpu
    device = -1 if host else a.get_device()
    if not (b.is_cpu if host else a.is_cuda and b.is_cuda and b.get_device() == device):
        return None
    key: tuple[Any, ...]
    # fmt: off
    learns = _grad_enabled() and not _inference()
    key = (loss, settings, device, _any_autocast() and _autocast("cpu" if host else "cuda"),
           a.dtype, a.shape, a.is_contiguous(), learns and a.requires_grad,
           b.dtype, b.shape, b.is_contiguous(), learns and b.requires_grad)
    # fmt: on
    if c is not None:
        if not (
            type(c) in PLAIN
            and c.layout is _strided
            and (c.is_cpu if host else c.is_cuda and c.get_device() == device)
            and not c.is_neg()
        ):
            return None
        key += c.dtype, c.shape, c.is_contiguous(), learns and c.requires_grad
    if keep:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = keep, _untried
        return None
    try:
        call, again = _known[key]
    except (KeyError, TypeError):  # a setting without a hash is for the checks to refuse
        return None
    # What is packed is looked at here, and later by the kernel.
    if (again is _untried or again is None) and not all(t is None or _storage(t) for t in tensors):
        return None
    if again is _untried:
        again = autograd.prepare(loss, call, tensors)
        _known[key] = call, again
    if (not host or gpu.on_cpu) and gpu.problem(call.family):
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


def _remember(loss: str, call: Call, tensors: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
    if (
        not all(type(s) in CONSTANTS for s in settings)  # a tensor's value may change
        or "elementwise_mean" in settings  # which warns each time
        # torch.jit.trace makes each size a tensor, which no key holds: so nothing without sizes is kept.
        or not all(t is None or t.dim() for t in tensors)
    ):
        return
    repeat(loss, tensors, settings, keep=call)


def dispatch_modes() -> int:
    """How many dispatch modes are active, which see every operation of torch."""
    return _dispatch_modes()


def formula_reason(
    call: Call | LinearCall, tensors: tuple[Tensor | None, ...], by_operator: bool = False
) -> str | None:
    """Why this call needs the formula, or None where a kernel serves: `by_operator` under a dispatch mode."""
    if _forced:
        return _forced
    if _transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if _dispatch_modes() and not by_operator:
        return "a TorchDispatchMode is active"
    if _is_tracing():
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


def calls() -> Counter[tuple[str, str]]:
    """How many calls each (loss, "kernel" or "formula") has had so far."""
    paths = {"kernel": _by_kernel, "formula": _by_formula}
    return Counter({(loss, path): n for path, by in paths.items() for loss, n in by.items()})


def count_kernel(loss: str) -> None:
    _by_kernel[loss] += 1


def is_exporting() -> bool:
    return torch.compiler.is_exporting()


# As torch.compiler.assume_constant_result does; the dynamo of torch 2.11 takes is_exporting itself for true.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _operator_serves(call: Call, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a traced call becomes an operator of `ops`; an exported one does not."""
    return (
        call.family != "pointwise"
        and not is_exporting()
        and not _transforms_active()
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
        return _formula(call, tensors)
    why = why or formula_reason(call, tensors)
    if why is None:
        count_kernel(loss)
        if _trace is not None:
            device = "GPU" if gpu.serves(tensors[0]) else "CPU"
            reason = f"the tensors are plain {device} tensors"
            _trace.append(Route(loss, call.name, reason, device))
        if settings is not None:
            _remember(loss, call, tensors, settings)
        try:
            return autograd.run(loss, call, tensors)
        except gpu.Failed as failed:
            gpu.turn_off(failed, call.family)
            why = str(gpu.problem(call.family))
    plain.check(loss, **dict(zip(call.arguments, tensors, strict=True)))
    note(loss, None, why)
    tensors = _made_dense(loss, call.arguments[0], tensors)
    if isinstance(call, RowsCall) and not call.probabilities:
        input, target, _ = tensors
        classes = input.shape[min(input.dim() - 1, 1)]
        check_range(loss, target, classes, call.ignore_index)
    return autograd.spanned(loss, lambda: _formula(call, tensors))


def _formula(call: Call, tensors: tuple[Any, ...]) -> Tensor:
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


def check_range(loss: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for the first class index out of range, where it can be read without a sync."""
    if target.is_cpu and not _dispatch_modes():
        target = sharded.whole(target)
    if not target.is_cpu or plain.gap(target) or _is_tracing():
        return
    # Who watches operations sees those of the loss alone.
    with _disable_current_modes() if _dispatch_modes() else contextlib.nullcontext():
        index = target.to(torch.int64)
        outside = (index != ignore_index) & ((index < 0) | (index >= classes))
        if outside.any():
            position = int(outside.flatten().nonzero()[0])
            errors.out_of_range(loss, target, position, classes, ignore_index)


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


def note(
    loss: str, kernel: str | None, why: str, device: str = "CPU", counted: bool = False
) -> None:
    """Counts a call that another module dispatches, unless its operator does, and tells `explain` of it."""
    if not counted:
        (_by_kernel if kernel else _by_formula)[loss] += 1
    if _trace is not None:
        _trace.append(Route(loss, kernel, why, device))


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
