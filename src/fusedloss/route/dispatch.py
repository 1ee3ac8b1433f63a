"""The path that a call takes: the kernel for plain tensors, the formula for the rest, both for DTensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..autograd import functions as autograd
from ..autograd import operators
from ..core import errors, plain, reduce, sharded, torch_state, trace
from ..core.plain import PLAIN
from ..core.shards import ClassShard
from ..engines import gpu
from ..kinds import Call
from . import logits, shards, shards_again
from .memo import Asked, remember
from .reasons import by_formula, formula_reason, operator_serves


def dispatch(
    loss: str,
    call: Call,
    tensors: tuple[Any, ...],
    why: str | None = None,
    asked: Asked | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Runs the call by its kernel, or by the formula: for the reason `why`, or one found here.

    What was `asked`, if that is given, `repeat` may do again: the checks saw nothing else but types and shapes.
    'mean' divides by the `denominator`, if one is given.
    """
    if denominator is not None:
        return _divided(loss, call, tensors, why, asked, denominator)
    if sharded.among(tensors):
        return _placed(loss, call, tensors, why, asked)
    if torch_state.is_compiling():
        if why is None and operator_serves(call, tensors):
            return operators.run(call, tensors)[0]
        return by_formula(call, tensors)
    why = why or formula_reason(call, tensors)
    if why is None:
        device = "GPU" if gpu.serves(tensors[0]) else "CPU"
        trace.note(loss, call.name, f"the tensors are plain {device} tensors", device)
        if asked is not None and not asked.over:
            remember(loss, call, asked, tensors, autograd.repeater, autograd.run)
        elif asked is not None and device == "CPU":
            remember(loss, call, asked, tensors, autograd.over, None)
        try:
            return autograd.run(loss, call, tensors)
        except gpu.Failed as failed:
            gpu.turn_off(failed, call.family)
            why = str(gpu.problem(call.family))
    plain.check(loss, **dict(zip(call.arguments, tensors, strict=True)))
    trace.note(loss, None, why)
    tensors = _made_dense(loss, call.arguments[0], tensors)
    call.check(tensors)
    return autograd.spanned(loss, lambda: by_formula(call, tensors))


def _placed(
    loss: str, call: Call, tensors: tuple[Any, ...], why: str | None, asked: Asked | None
) -> Tensor:
    """The loss of DTensors."""

    def compute(own: Any, local: tuple[Any, ...], shard: ClassShard | None) -> tuple[Tensor]:
        if shard is None:
            return (dispatch(loss, own, local, why),)
        return (logits.run(own, shard, *local),)

    def run(own: Any, given: tuple[Any, ...], told: shards.Rows | None = None) -> shards.Done:
        return shards.run(loss, own, given, compute, lambda: check_whole(own, given), told)

    done = run(call, tensors)
    if not (asked is None or why or torch_state.is_compiling()) and _by_kernel(done):
        whole = shards_again.Whole(call, run, check_whole)
        shards_again.remember(loss, asked, tensors, done, whole)
    found: Tensor = done.results[0]
    return found


def _by_kernel(done: shards.Done) -> bool:
    return not trace.watched and formula_reason(done.call, done.given) is None


def _divided(
    loss: str,
    call: Call,
    tensors: tuple[Any, ...],
    why: str | None,
    asked: Asked | None,
    denominator: Tensor | float,
) -> Tensor:
    """A mean over another number than the call's count: by the call, where that can be read for nothing."""
    if number := plain.number_of(denominator):
        own = replace(call, denominator=number)
        return dispatch(loss, own, tensors, why, asked and asked._replace(over=True))
    exact = reduce.exact(tensors[0])
    total = dispatch(loss, replace(call, denominator=1.0, dtype=exact), tensors, why)
    if isinstance(denominator, Tensor):
        denominator = sharded.beside(loss, "denominator", denominator.to(exact), total)
    return (total / denominator).to(call.dtype)


def check_whole(call: Any, tensors: tuple[Any, ...]) -> None:
    """Refuses class indices out of range in DTensors, by their positions in the whole; collective."""
    call.check(tuple(sharded.whole(t) if k in call.indices else t for k, t in enumerate(tensors)))


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
