"""The autograd function over all kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu, gpu
from .calls import Call


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


class _Fused(torch.autograd.Function):
    """A reduced loss computes its gradients in forward, and they wait; others in backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        ctx.call, ctx.stored = call, call.stores_gradients and not _narrow(tensors, needed)
        result, grads = engine(call, tensors[0]).forward(
            call, tensors, needed if ctx.stored else ()
        )
        ctx.save_for_backward(*tensors, *grads)
        return result

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        try:
            return _Fused._backward(ctx, incoming[0])
        except gpu.Failed as failed:
            gpu.turn_off(failed)
            needed = ctx.needs_input_grad[1:]
            with torch.enable_grad():
                grads = redo(ctx.call, ctx.saved_tensors[: len(needed)], needed, incoming[0])
            return (None, *(g if g is None else g.detach() for g in grads))

    @staticmethod
    def _backward(ctx: Any, arrived: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        needed = ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors
        tensors, stored = saved[: len(needed)], saved[len(needed) :]
        if torch.is_grad_enabled():
            return (None, *redo(call, tensors, needed, arrived))
        plain = is_plain(arrived)
        if ctx.stored and plain and gpu.serves(arrived):
            grads = rescaled(call, tensors, stored, arrived)
        elif ctx.stored and (not plain or _scales_exactly(stored, arrived)):
            found = stored[: call.gradients]
            grads = [g if g is None else scaled(g, arrived, plain) for g in found]
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
            if grad is not None and grad.shape != tensors[k].shape:
                grads[k] = grad.sum_to_size(tensors[k].shape)
        return (None, *grads, *(None,) * (len(tensors) - len(grads)))


# No transform is active here: what `Function.apply` does for them is left out.
_apply = super(torch.autograd.Function, _Fused).apply


def _narrow(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> bool:
    """Whether a float16 gradient is needed: one stored before it is scaled would underflow."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float16:
            return any(
                need and t is not None and t.dtype is torch.float16
                for t, need in zip(tensors, needed, strict=True)
            )
    return False


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
        and torch._C._has_storage(incoming)
        and not torch._C._len_torch_dispatch_stack()
        and not incoming.is_neg()
    )


def scaled(grad: Tensor, incoming: Tensor, plain: bool) -> Tensor:
    """The stored gradient times the scalar that arrives, which may be `plain`.

    The stored tensor itself is given away only when the graph is freed: another backward would
    otherwise find it changed by whoever accumulates into it.
    """
    if not plain or torch._C._autograd._get_current_graph_task_keep_graph():
        return grad * incoming
    return grad if incoming.item() == 1.0 else grad.mul_(incoming)


def rescaled(
    call: Call,
    tensors: Sequence[Tensor | None],
    stored: Sequence[Tensor | None],
    incoming: Tensor,
) -> list[Tensor | None]:
    """The same on a GPU, where a kernel looks at the scalar, and computes anew unless it is 1."""
    grads, rest = list(stored[: call.gradients]), stored[call.gradients :]
    if torch._C._autograd._get_current_graph_task_keep_graph():
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
