"""Which loop runs a head, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.reduce import wide
from ...kinds.heads import LinearCall, Slot, Slots
from .chunked import DistillLoop, Loop
from .shards import DivergenceLoop, LogitsLoop, ShardLoop
from .straight import Straight, straight

SUM_BLOCK = 1 << 14
LOOPS = {"linear": Loop, "distill": DistillLoop}
OF_SHARDS = {"linear": ShardLoop, "distill": DivergenceLoop, "logits": LogitsLoop}


def run(
    call: LinearCall,
    tensors: Slots,
    needed: Sequence[bool] = (),
    incoming: Sequence[Slot] | None = None,
    sums: Slot = None,
) -> tuple[tuple[Tensor, ...], list[Slot]]:
    """The results of the call, and the gradients that are needed.

    Reduced losses differentiate themselves; others by `incoming`, the gradients of all results. Where the call
    has a shard of the classes, `sums` (N, K, call.sums) keep what all processes gathered of the rows: with
    `incoming` they are given.
    Gradients by half types are of float32, for whoever scales and rounds them.
    """
    arriving = incoming[0] if incoming else None
    if straight(call, tensors, needed, arriving):
        result, grads = Straight(call, tensors, needed, arriving)(tensors, arriving)
        result = result if call.reduction != "none" else result.unsqueeze(1)
        each = iter(grads)
        return (result,), [
            next(each).to(wide(t)).view(t.shape) if need and k < 3 and t is not None else None
            for k, (t, need) in enumerate(zip(tensors, needed, strict=False))
        ]
    loop: Loop
    if call.shard is None:
        loop = LOOPS[call.family](call, tensors, needed, incoming)
    else:
        loop = OF_SHARDS[call.family](call, tensors, needed, incoming, sums)
    for head in range(loop.heads):
        loop.head(head)
    loop.close()
    return call.results(loop.results, tensors, _in_blocks), loop.grads


def _in_blocks(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Their sum in an order that does not depend on threads, among whom torch shares longer ones."""
    flat = values.reshape(-1)
    whole = flat.shape[0] // SUM_BLOCK * SUM_BLOCK
    if not whole or not flat.is_cpu:
        return flat.sum(dtype=dtype)
    blocks = flat[:whole].view(-1, SUM_BLOCK).sum(1, dtype=dtype)
    return blocks.sum() + flat[whole:].sum(dtype=dtype)
