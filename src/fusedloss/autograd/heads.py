"""The autograd function over the loop, and what it shares with the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import errors, plain, torch_state
from ..engines import gpu
from ..engines.chunks.loop import run
from ..kinds.heads import LinearCall, Slot, Slots
from . import functions as autograd

_hooks = torch_state.saved_tensor_hooks


class Like(NamedTuple):
    """What a saved tensor was in forward."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        return cls(tensor.shape, tensor.dtype, tensor.device)


class Chunked(torch.autograd.Function):
    """A reduced loss computes its gradients in forward, and they wait; others in backward."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, *tensors: Slot) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[1:]
        ctx.call, ctx.stored = call, call.reduction != "none"
        results, grads = run(call, tensors, needed[:4] if ctx.stored else ())
        ctx.like = [None if t is None else Like.of(t) for t in tensors]
        # Autograd saves no tensor of inference mode, whose changes it could not see.
        kept = [t if t is None or not t.is_inference() else None for t in tensors]
        if not ctx.stored:
            kept = [
                t if k is not None or t is None else t.clone()
                for t, k in zip(tensors, kept, strict=True)
            ]
        ctx.save_for_backward(*kept, *grads)
        ctx.own = _hooks(True) is None  # what is stored is nobody else's
        ctx.on_gpu = gpu.serves(tensors[0])
        ctx.set_materialize_grads(False)
        if call.statistics:
            ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *incoming: Slot) -> tuple[Slot, ...]:
        if torch.compiler.is_compiling():
            return _traced(ctx, incoming)
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        if ctx.on_gpu and gpu.problem(call.family) is None:
            gpu.family("flags").raise_pending(ctx.like[0].device)
        for g in incoming:
            plain.check(call.loss, incoming=g)
        saved = autograd.unpacked(ctx)
        create_graph = torch.is_grad_enabled()
        if all(g is None for g in incoming):
            grads: Sequence[Slot] = [None] * len(needed)
        elif ctx.stored and not create_graph:
            assert incoming[0] is not None
            stored = [_unchanged(each) for each in saved[len(needed) :]]
            grads = autograd.scaled(stored, incoming[0], ctx.own and autograd.is_plain(incoming[0]))
        else:
            tensors = _settled(ctx, saved[: len(needed)])
            arrived = [g for g in incoming if g is not None]
            if create_graph or unreadable(tensors) or not all(map(autograd.is_plain, arrived)):
                grads = redo(call, tensors, needed, incoming, create_graph)
            else:
                grads = run(call, tensors, needed[:4], incoming)[1]
        return (None, *grads, *(None,) * (len(needed) - len(grads)))


def _traced(ctx: Any, incoming: Sequence[Slot]) -> tuple[Slot, ...]:
    """What compiled autograd traces."""
    from .head_operators import gradients

    call, needed = ctx.call, ctx.needs_input_grad[1:]
    saved = ctx.saved_tensors
    tensors, stored = saved[: len(needed)], saved[len(needed) :]
    wanted, kept = needed[: call.gradients], stored if ctx.stored else None
    grads = gradients(call, tensors, wanted, kept, incoming)
    return (None, *grads, *(None,) * (len(needed) - len(grads)))


def unreadable(tensors: Sequence[Slot]) -> str | None:
    """Why the loop over chunks cannot take the tensors, or None. Elsewhere it is made of torch operations."""
    for tensor in tensors:
        if tensor is None:
            continue
        ours = tensor.is_cpu or tensor.is_cuda or tensor.is_meta
        if (ours or type(tensor) not in plain.PLAIN) and (why := plain.gap(tensor)):
            return why
    return None


def _unchanged(saved: Any) -> Slot:
    if type(saved) is autograd.Changed:
        raise saved.error
    return saved


def _settled(ctx: Any, saved: Sequence[Any]) -> Slots:
    """The tensors that forward was given.

    Raises:
        RuntimeError: one was changed in place, has another shape or device, or no memory any more; or it was
            not kept.
    """
    call, found = ctx.call, []
    for name, tensor, like in zip(call.arguments, saved, ctx.like, strict=True):
        if type(tensor) is autograd.Changed:
            why = (
                "the gradient was kept, but with create_graph=True it is computed anew, from what it was"
                if ctx.stored
                else "without a reduction no gradient is kept, and backward takes the inputs once more"
            )
            words = f"{name} was changed after the loss was taken: {tensor.error} {why}: change a clone()"
            raise RuntimeError(f"{call.loss}: {words}") from tensor.error
        if like is not None:
            if tensor is None:
                words = f"{name} is of inference mode, and not kept: create_graph=True needs a clone() of it"
                errors.fail(RuntimeError, call.loss, words)
            if (tensor.shape, tensor.device) != (like.shape, like.device):
                got = f"{list(tensor.shape)} on {tensor.device}"
                words = f"{name} was saved for backward as {list(like.shape)} on {like.device}"
                errors.fail(RuntimeError, call.loss, f"{words}, and came back as {got}")
            plain.check(call.loss, **{name: tensor})
            tensor = tensor.to(like.dtype)
        found.append(tensor)
    return tuple(found)


def redo(
    call: LinearCall,
    tensors: Slots,
    needed: Sequence[bool],
    incoming: Sequence[Slot],
    create_graph: bool,
) -> list[Slot]:
    """Gradients by the formula: for `create_graph=True`, and for gradients that are mapped."""
    with torch.enable_grad():
        inputs = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
        pairs = zip(call.by_formula(*tensors), incoming, strict=True)
        outputs, arriving = zip(*((t, g) for t, g in pairs if g is not None), strict=True)
        found = iter(
            torch.autograd.grad(
                outputs, inputs, arriving, create_graph=create_graph, materialize_grads=True
            )
        )
    return [next(found) if need else None for need in needed]
