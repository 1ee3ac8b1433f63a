"""Which path a head takes: the loop over chunks, or the formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..autograd import heads_again, operators
from ..autograd.functions import learns, named, spanned
from ..autograd.heads import Chunked
from ..core import sharded, torch_state, trace
from ..core.reduce import autocasts
from ..engines import gpu
from ..engines.chunks.loop import run as run_chunks
from ..kinds.heads import LinearCall, Ready, Slot, Slots
from . import shards
from .memo import Asked, remember
from .reasons import by_formula, formula_reason, operator_serves


def dispatch(ready: Ready, asked: Asked | None = None) -> Any:
    """The loss of a checked call."""
    return ready.done(results(ready.call, ready.tensors, ready.target, asked))


def results(
    call: LinearCall, tensors: Slots, given: Slot, asked: Asked | None = None
) -> tuple[Tensor, ...]:
    """The results of the call; `given` is the target as the caller shaped it."""
    if sharded.among(tensors):
        return shards.run(
            call.loss,
            call,
            tensors,
            lambda own, local, shard: results(
                own if shard is None else replace(own, shard=shard), local, None
            ),
            lambda: call.check(tensors, sharded.whole(given)),
        ).results
    why = "a setting requires a gradient" if call.learns else None
    if torch_state.is_compiling():
        if why is None and operator_serves(call, tensors):
            return operators.run(call, tensors)
        return by_formula(call, tensors)
    why = why or formula_reason(call, tensors)
    device = "GPU" if gpu.serves(tensors[0]) else "CPU"
    seen = not why and torch_state.dispatch_modes()
    because = why or (
        "a TorchDispatchMode sees it as one operator" if seen else "no transform needs the formula"
    )
    trace.note(call.loss, None if why else call.family, because, device, counted=bool(seen))
    call.check(tensors, given)
    if why:
        return spanned(call.loss, lambda: by_formula(call, tensors))
    if seen:
        return operators.run(call, tensors)
    if asked is not None and not autocasts("cpu"):
        _remember(call, tensors, asked)
    differentiable = tensors[: call.gradients]
    if learns() and any(t is not None and t.requires_grad for t in differentiable):
        return named(Chunked, call.loss)(call, *tensors)
    return spanned(call.loss, lambda: run_chunks(call, tensors)[0])


def _remember(call: LinearCall, tensors: Slots, asked: Asked) -> None:
    if heads_again.serves(call, tensors, asked.tensors):
        places = [k for k, t in enumerate(tensors) if t is not None]
        how = heads_again.repeater(places), heads_again.checked
        remember(call.loss, call, asked, asked.tensors, *how)
