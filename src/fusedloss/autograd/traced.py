"""The backward of losses that were called, as compiled autograd traces it: operators and torch operations.

What is traced asks for no number and starts no kernel itself: either would break the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..engines.cpu.again import Again
from ..kinds import Call
from ..kinds.pointwise import PointwiseCall
from . import operators as ops

Slot = Tensor | None


def gradients(
    call: Call,
    tensors: Sequence[Slot],
    needed: Sequence[bool],
    stored: Sequence[Slot] | None,
    incoming: Tensor,
) -> list[Slot]:
    """By the first tensors; `stored` are those that forward computed, if it did."""
    grads: list[Slot]
    if stored is not None:
        grads = [None if g is None else g * incoming for g in stored]
    elif isinstance(call, PointwiseCall):
        grads = call.gradients_by_formula(tensors, needed, incoming)
    else:
        given: tuple[Any, ...] = (incoming, list(needed), *tensors, *ops.settings(call))
        found = iter(ops.operator(f"{call.family}_backward")(*given))
        grads = [next(found) if need else None for need in needed]
    pairs = zip(grads, tensors, strict=False)
    return [g if g is None or t is None else g.sum_to_size(t.shape) for g, t in pairs]


def fused(ctx: Any, incoming: Tensor) -> tuple[Slot, ...]:
    """The backward of `autograd._Fused`."""
    needed, saved = ctx.needs_input_grad[1:], ctx.saved_tensors
    tensors, stored = saved[: len(needed)], saved[len(needed) :]
    kept = stored[: ctx.call.gradients] if ctx.stored else None
    grads = gradients(ctx.call, tensors, needed, kept, incoming)
    return (None, *grads, *(None,) * (len(tensors) - len(grads)))


def again(ctx: Any, incoming: Tensor) -> tuple[Slot, ...]:
    """The backward of `autograd._Again`."""
    plan, saved = ctx.again, ctx.saved_tensors
    tensors, stored = (*saved[: plan.inputs], *plan.absent), saved[plan.inputs :]
    needed = [k < plan.learned for k in range(len(tensors))]
    stores = plan.stored if isinstance(plan, Again) else plan.stores
    grads = gradients(
        plan.call, tensors, needed, stored[: plan.learned] if stores else None, incoming
    )
    lacking = (None,) * (plan.inputs - len(grads))
    return (None, *grads[: plan.inputs], *lacking)
