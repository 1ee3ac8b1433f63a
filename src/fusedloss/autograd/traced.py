"""The backward of losses that were called, as compiled autograd traces it: operators and torch operations.

What is traced asks for no number and starts no kernel itself: either would break the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..kinds.heads import of_one_head
from ..kinds.pointwise import PointwiseCall
from . import operators

Slot = Tensor | None


def _gradients(
    call: Any,
    tensors: Sequence[Slot],
    needed: Sequence[bool],
    stored: Sequence[Slot] | None,
    incoming: Sequence[Slot],
) -> list[Slot]:
    """By the first tensors; `stored` are those that forward computed, if it did."""
    if not isinstance(call, PointwiseCall):
        return operators.gradients(call, tensors, needed, stored, incoming)
    (arrived,) = incoming
    assert arrived is not None
    found: Sequence[Slot]
    found = (
        operators.scaled(stored, arrived)
        if stored is not None
        else call.gradients_by_formula(tensors, needed, arrived)
    )
    pairs = zip(found, tensors, strict=False)
    return [g if g is None or t is None else g.sum_to_size(t.shape) for g, t in pairs]


def backward(ctx: Any, *incoming: Slot) -> tuple[Slot, ...]:
    """Of a call that saved its tensors, and the gradients if `ctx.stored`."""
    call, needed, saved = ctx.call, ctx.needs_input_grad[1:], ctx.saved_tensors
    tensors, stored = saved[: len(needed)], saved[len(needed) :]
    kept = stored[: call.gradients] if ctx.stored else None
    grads = _gradients(call, tensors, needed[: call.gradients], kept, incoming)
    return (None, *grads, *(None,) * (len(tensors) - len(grads)))


def head(ctx: Any, incoming: Tensor) -> tuple[Slot, ...]:
    """Of a head like an earlier one."""
    plan, saved = ctx.again, ctx.saved_tensors
    tensors, stored = saved[: plan.inputs], iter(saved[plan.inputs :])
    given = plan.slots((*tensors, None))
    own = of_one_head(given)
    pairs = list(zip(plan.needed, own, strict=False))
    kept: Sequence[Slot] | None = None
    if plan.stores:
        kept = [
            next(stored).reshape(t.shape) if need and t is not None else None for need, t in pairs
        ]
    grads = operators.gradients(plan.call, own, plan.needed, kept, [plan.arrived(incoming)])
    found = [
        g.reshape(t.shape)
        for g, t in zip(grads, given, strict=False)
        if g is not None and t is not None
    ]
    result: tuple[Slot, ...] = plan.returned((*found, None))
    return result


def again(ctx: Any, incoming: Tensor) -> tuple[Slot, ...]:
    """Of a call like an earlier one."""
    plan, saved = ctx.again, ctx.saved_tensors
    tensors, stored = (*saved[: plan.inputs], *plan.absent), saved[plan.inputs :]
    needed = [*plan.needed, *(False,) * (plan.call.gradients - len(plan.needed))]
    kept = plan.kept(stored)[: plan.call.gradients] if plan.stores else None
    grads = _gradients(plan.call, tensors, needed, kept, [incoming])
    lacking = (None,) * (plan.inputs - len(grads))
    return (None, *grads[: plan.inputs], *lacking)
