"""The autograd function over the loop over chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import plain, torch_state
from ..core.plain import is_plain
from ..engines import gpu
from ..engines.chunks.loop import run
from ..kinds.heads import LinearCall, Slot, Slots
from . import traced
from .gradients import redo, scaled
from .saved import Saved, unchanged, unpacked

_hooks = torch_state.saved_tensor_hooks


class Chunked(torch.autograd.Function):
    """A reduced loss computes its gradients in forward, and they wait; others in backward."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, *tensors: Slot) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[1:]
        ctx.call, ctx.stored = call, call.stores_gradients
        # Backward makes the logits again, but gathers nothing again from other processes.
        sums = call.empty_sums(tensors) if call.shard and not ctx.stored else None
        results, grads = run(call, tensors, needed[:4] if ctx.stored else (), sums=sums)
        # Autograd saves no tensor of inference mode, whose changes it could not see.
        kept = (t if t is None or not t.is_inference() else None for t in tensors)
        if not ctx.stored:
            pairs = zip(tensors, kept, strict=True)
            kept = (t.clone() if k is None and t is not None else k for t, k in pairs)
        ctx.save_for_backward(*kept, *grads, sums)
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in tensors]
        assert tensors[0] is not None
        ctx.device, ctx.number = tensors[0].device, tensors[0].get_device()
        ctx.on_gpu, ctx.own = gpu.serves(tensors[0]), _hooks(True) is None
        ctx.set_materialize_grads(False)
        if call.statistics:
            ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *incoming: Slot) -> tuple[Slot, ...]:
        if torch_state.is_compiling():
            return traced.backward(ctx, *incoming)
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        if ctx.on_gpu and gpu.problem(call.family) is None:
            gpu.family("flags").raise_pending(ctx.device)
        for g in incoming:
            plain.check(call.loss, incoming=g)
        saved = unpacked(ctx)
        tensors, stored, sums = saved[: len(needed)], saved[len(needed) : -1], saved[-1]
        create_graph = torch.is_grad_enabled()
        grads: Sequence[Slot] = ()
        if all(g is None for g in incoming):
            pass
        elif ctx.stored and not create_graph:
            assert incoming[0] is not None
            own = ctx.own and is_plain(incoming[0])
            grads = scaled(unchanged(stored), incoming[0], own)
        else:
            given = _settled(ctx, tensors, create_graph)
            arrived = [g for g in incoming if g is not None]
            if (
                create_graph
                or plain.first_gap(given, everywhere=True)
                or not all(map(is_plain, arrived))
            ):
                grads = redo(call, given, needed, incoming, create_graph)
            else:
                (sums,) = unchanged([sums])
                grads = run(call, given, needed[:4], incoming, sums)[1]
        return (None, *grads, *(None,) * (len(needed) - len(grads)))


def _settled(ctx: Any, tensors: Sequence[Any], create_graph: bool) -> Slots:
    """The tensors that forward was given, in their types."""
    call, needed = ctx.call, ctx.needs_input_grad[1:]
    shapes = [None if like is None else like[0] for like in ctx.like]
    stored = () if ctx.stored else None
    saved = Saved(ctx, call, tensors, needed, stored, torch.Size(), shapes, ctx.number, ctx.own)
    pairs = zip(saved.settled(create_graph), ctx.like, strict=True)
    return tuple(t if t is None else t.to(like[1]) for t, like in pairs)
