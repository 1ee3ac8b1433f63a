"""Which path a linear loss takes: the loop over chunks, or the formula for transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import head_operators as op
from ..autograd.functions import learns, named, spanned
from ..autograd.heads import Chunked, unreadable
from ..core import sharded, torch_state, trace
from ..core.indices import check_range
from ..engines import gpu
from ..engines.chunks.loop import run as run_chunks
from ..kinds.heads import LinearCall, Slot, Slots
from . import dispatch as route
from . import modes


def dispatch(call: LinearCall, tensors: Slots, given: Slot) -> tuple[Tensor, ...]:
    """The results of the call; `given` is the target as the caller shaped it."""
    if torch.compiler.is_compiling():
        serves = _operator_serves(call, tensors)
        return op.run(call, tensors) if serves else _by_formula(call, tensors)
    why = _formula_reason(call, tensors)
    device = "GPU" if gpu.serves(tensors[0]) else "CPU"
    seen = not why and torch_state.dispatch_modes()
    because = why or (
        "a TorchDispatchMode sees it as one operator" if seen else "no transform needs the formula"
    )
    trace.note(call.loss, None if why else call.family, because, device, counted=bool(seen))
    if given is not None and not call.probabilities:
        linear_weight = tensors[1]
        assert linear_weight is not None
        check_range(call.loss, given, linear_weight.shape[0], call.ignore_index)
    if why:
        return spanned(call.loss, lambda: _by_formula(call, tensors))
    if seen:
        return op.run(call, tensors)
    differentiable = tensors[: call.gradients]
    if learns() and any(t is not None and t.requires_grad for t in differentiable):
        return named(Chunked, call.loss)(call, *tensors)
    return spanned(call.loss, lambda: run_chunks(call, tensors)[0])


def _by_formula(call: LinearCall, tensors: Slots) -> tuple[Tensor, ...]:
    """Plain class indices and weights count as replicated beside DTensors, but no teacher's tensors."""
    return sharded.run(call.by_formula, tensors, 3, 7)


def _formula_reason(call: LinearCall, tensors: Slots) -> str | None:
    if call.learns:
        return "a setting requires a gradient"
    if why := unreadable(tensors):
        return why
    if any(t is not None and t.requires_grad for t in tensors[call.gradients :]):
        return "a weight requires a gradient"
    floats = (t if t is None or (t.is_cpu and t.is_floating_point()) else None for t in tensors)
    by_operator = (
        bool(torch_state.dispatch_modes())
        and modes.gap() is None
        and _operator_serves(call, tensors)
    )
    return route.formula_reason(call, tuple(floats), by_operator)


def _operator_serves(call: LinearCall, tensors: Slots) -> bool:
    return (
        not (call.learns or torch_state.is_exporting())
        and not torch_state.transforms_active()
        and all(
            t is None or (t.device.type in ("cpu", "cuda") and not sharded.is_sharded(t))
            for t in tensors
        )
        and not any(t is not None and t.requires_grad for t in tensors[call.gradients :])
    )
