"""The autograd functions over all kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import cpu, gpu
from .calls import Call
from .cpu.again import Again

T = TypeVar("T", Tensor, "Tensor | None")

# Asked at every backward: bound here once.
_has_storage = torch._C._has_storage
_dispatch_modes = torch._C._len_torch_dispatch_stack
_grad_enabled = torch.is_grad_enabled
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def engine(call: Call, tensor: Tensor | None) -> ModuleType:
    """The module whose `forward` and `backward` run the call on the device of the tensor.

    After the gradients a GPU's `forward` may give more, which its `rescale` takes beside them.
    """
    if gpu.serves(tensor):
        return gpu.family(call.family)
    return getattr(cpu, call.family)


def run(call: Call, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """The loss by its kernel, differentiable by the first `call.gradients` tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors[: call.gradients]:
            if tensor is not None and tensor.requires_grad:
                return _apply(call, *tensors)
    return engine(call, tensors[0]).forward(call, tensors, ())[0]


def repeat(again: Again, tensors: tuple[Any, ...]) -> Tensor:
    """The same, for tensors like those that `prepare` was given."""
    given = tensors[: again.inputs]
    if not again.learned:
        return again.forward(given)[0]
    return (_apply_again if type(again) is Again else _apply_on_gpu)(again, *given)


def prepare(call: Call, tensors: tuple[Tensor | None, ...]) -> Again | None:
    """How a call may be repeated at less cost: a reduced loss of contiguous tensors. Or None."""
    enabled = torch.is_grad_enabled()
    needed = [enabled and t is not None and t.requires_grad for t in tensors[: call.gradients]]
    learned = sum(needed)
    if (
        call.reduction == "none"
        or not all(needed[:learned])
        or not all(t is None or (t.is_contiguous() and t.numel()) for t in tensors)
    ):
        return None
    stores = _stores_gradients(call, tensors, needed)
    again = gpu.family("again") if gpu.serves(tensors[0]) else cpu.again
    return again.prepare(engine(call, tensors[0]), call, tensors, needed, stores)


class _Fused(torch.autograd.Function):
    """A reduced loss computes its gradients in forward, and they wait; others in backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        ctx.call, ctx.stored = call, _stores_gradients(call, tensors, needed)
        result, grads = engine(call, tensors[0]).forward(
            call, tensors, needed if ctx.stored else ()
        )
        ctx.save_for_backward(*tensors, *grads)
        return result

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        call, needed, saved = ctx.call, ctx.needs_input_grad[1:], ctx.saved_tensors
        tensors, stored = saved[: len(needed)], saved[len(needed) :]
        grads = _gradients(call, tensors, needed, stored if ctx.stored else None, incoming[0])
        return (None, *grads, *(None,) * (len(tensors) - len(grads)))


def _gradients(
    call: Call,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    stored: Sequence[Tensor | None] | None,
    arrived: Tensor,
) -> Sequence[Tensor | None]:
    """The gradients by the first tensors; `stored` are those that forward computed, and more."""
    if torch.is_grad_enabled():
        return redo(call, tensors, needed, arrived)
    try:
        return _by_kernel(call, tensors, needed, stored, arrived)
    except gpu.Failed as failed:
        gpu.turn_off(failed, call.family)
    with torch.enable_grad():
        found = redo(call, tensors, needed, arrived)
    return [g if g is None else g.detach() for g in found]


def _by_kernel(
    call: Call,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    stored: Sequence[Tensor | None] | None,
    arrived: Tensor,
) -> Sequence[Tensor | None]:
    plain = is_plain(arrived)
    if stored is not None and plain and gpu.serves(arrived):
        grads = rescaled(call, tensors, stored, arrived)
    elif stored is not None and (not plain or _scales_exactly(stored, arrived)):
        grads = list(scaled(stored[: call.gradients], arrived, plain))
    elif plain:
        grads = engine(call, tensors[0]).backward(call, tensors, needed, arrived)
    else:
        one = torch.ones(arrived.shape, dtype=arrived.dtype, device=arrived.device)
        spread = call.spread(arrived)
        grads = [
            None if g is None else g * spread
            for g in engine(call, tensors[0]).backward(call, tensors, needed, one)
        ]
    for k, grad in enumerate(grads):
        tensor = tensors[k]
        if grad is not None and tensor is not None and grad.shape != tensor.shape:
            grads[k] = grad.sum_to_size(tensor.shape)
    return grads


class _Again(torch.autograd.Function):
    """A call like an earlier one."""

    @staticmethod
    def forward(ctx: Any, again: Any, *tensors: Tensor) -> Tensor:
        result, grads = again.forward(tensors)
        ctx.again = again
        ctx.save_for_backward(*tensors, *grads)
        return result

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        again, saved = ctx.again, ctx.saved_tensors
        stored = saved[again.inputs :]
        if not _grad_enabled() and is_plain(incoming):
            if not stored:
                return (None, *again.backward(saved, incoming), *again.undefined)
            if incoming.item() == 1.0 and not _keeps_graph():
                return (None, *stored, *again.undefined)
            if _scales_exactly(stored, incoming):
                return (None, *scaled(stored, incoming, True), *again.undefined)
        return _by_all_means(ctx, saved, stored, incoming)


class _AgainOnGpu(_Again):
    """The same where a kernel looks at the scalar that arrives."""

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        again, saved = ctx.again, ctx.saved_tensors
        tensors, stored = saved[: again.inputs], saved[again.inputs :]
        if not _grad_enabled() and is_plain(incoming) and not (stored and _keeps_graph()):
            try:
                return (None, *again.backward(tensors, stored, incoming))
            except gpu.Failed:
                pass  # told below
        return _by_all_means(ctx, saved, stored, incoming)


def _by_all_means(
    ctx: Any, saved: Sequence[Tensor], stored: Sequence[Tensor | None], incoming: Tensor
) -> tuple[Tensor | None, ...]:
    """What backward returns for a call like an earlier one that is differentiated otherwise."""
    again = ctx.again
    tensors = again.whole(saved[: again.inputs])
    needed = (*ctx.needs_input_grad[1:], *(False for _ in again.absent))
    grads = _gradients(again.call, tensors, needed, stored or None, incoming)
    lacking = (None,) * (again.inputs - len(grads))
    return (None, *grads[: again.inputs], *lacking)


# No transform is active here: what `Function.apply` does for them is left out.
_apply = super(torch.autograd.Function, _Fused).apply
_apply_again = super(torch.autograd.Function, _Again).apply
_apply_on_gpu = super(torch.autograd.Function, _AgainOnGpu).apply
# As its own `apply` does it, but for choosing between `backward` and `vjp`: a microsecond.
_Again._backward_cls.apply = _Again.backward  # type: ignore[attr-defined]
_AgainOnGpu._backward_cls.apply = _AgainOnGpu.backward  # type: ignore[attr-defined]


def _stores_gradients(call: Call, tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> bool:
    """Whether forward computes the gradients; one of float16, stored before it is scaled, would underflow."""
    return call.stores_gradients and not any(
        need and t is not None and t.dtype is torch.float16
        for t, need in zip(tensors, needed, strict=False)
    )


def _scales_exactly(grads: Sequence[Tensor | None], incoming: Tensor) -> bool:
    """Whether scaling loses nothing that counts; a bfloat16 gradient would be rounded twice."""
    for grad in grads:
        if grad is not None and grad.dtype is torch.bfloat16:
            return abs(math.frexp(incoming.item())[0]) == 0.5
    return True


def is_plain(incoming: Tensor) -> bool:
    """Whether a kernel can read the gradient that arrives (a mapped or fake one has no memory)."""
    return (
        type(incoming) is Tensor
        and _has_storage(incoming)
        and not _dispatch_modes()
        and not incoming.is_neg()
    )


def scaled(grads: Sequence[T], incoming: Tensor, plain: bool) -> Sequence[T]:
    """The stored gradients times the scalar that arrives, which may be `plain`.

    The stored tensors themselves are given away only when the graph is freed: another backward would
    otherwise find them changed by whoever accumulates into them.
    """
    if not plain or _keeps_graph():
        return [g if g is None else g * incoming for g in grads]
    if incoming.item() != 1.0:
        for grad in grads:
            if grad is not None:
                grad.mul_(incoming)
    return grads


def rescaled(
    call: Call,
    tensors: Sequence[Tensor | None],
    stored: Sequence[Tensor | None],
    incoming: Tensor,
) -> list[Tensor | None]:
    """The same on a GPU, where a kernel looks at the scalar, and computes anew unless it is 1."""
    grads, rest = list(stored[: call.gradients]), stored[call.gradients :]
    if _keeps_graph():
        grads = [g if g is None else g.clone() for g in grads]
    engine(call, tensors[0]).rescale(call, tensors, (*grads, *rest), incoming)
    return grads


def redo(
    call: Call, tensors: Sequence[Any], needed: Sequence[bool], incoming: Tensor
) -> list[Tensor | None]:
    """Gradients that are themselves differentiable, by the formula: for `create_graph=True`."""
    inputs = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
    found = iter(
        torch.autograd.grad(
            call.by_formula(*tensors), inputs, incoming, create_graph=True, materialize_grads=True
        )
    )
    return [next(found) if need else None for need in needed]
