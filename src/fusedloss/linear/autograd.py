"""The autograd function over the loop, and what it shares with the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autograd, gpu
from .call import LinearCall, Slot, Slots
from .chunks import run


class Chunked(torch.autograd.Function):
    """A reduced loss computes its gradients in forward, and they wait; others in backward."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, *tensors: Slot) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[1:]
        ctx.call, ctx.stored = call, call.reduction != "none"
        results, grads = run(call, tensors, needed[:4] if ctx.stored else ())
        ctx.save_for_backward(*tensors, *grads)
        ctx.set_materialize_grads(False)
        if call.statistics:
            ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *incoming: Slot) -> tuple[Slot, ...]:
        if torch.compiler.is_compiling():
            return _traced(ctx, incoming)
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors
        if gpu.serves(saved[0]) and gpu.problem(call.family) is None:
            gpu.family("flags").raise_pending(saved[0].device)
        tensors, stored = saved[: len(needed)], saved[len(needed) :]
        if all(g is None for g in incoming):
            grads: Sequence[Slot] = [None] * len(needed)
        elif torch.is_grad_enabled():
            grads = redo(call, tensors, needed, incoming, create_graph=True)
        elif ctx.stored:
            assert incoming[0] is not None
            plain = autograd.is_plain(incoming[0])
            grads = autograd.scaled(stored, incoming[0], plain)
        elif all(g is None or autograd.is_plain(g) for g in incoming):
            grads = run(call, tensors, needed[:4], incoming)[1]
        else:
            grads = redo(call, tensors, needed, incoming, create_graph=False)
        return (None, *grads, *(None,) * (len(needed) - len(grads)))


def _traced(ctx: Any, incoming: Sequence[Slot]) -> tuple[Slot, ...]:
    """What compiled autograd traces."""
    from .op import gradients

    call, needed = ctx.call, ctx.needs_input_grad[1:]
    tensors, stored = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
    wanted, kept = needed[: call.gradients], stored if ctx.stored else None
    grads = gradients(call, tensors, wanted, kept, incoming)
    return (None, *grads, *(None,) * (len(needed) - len(grads)))


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
