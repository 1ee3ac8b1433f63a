"""The loop over chunks as operators of torch, so that torch.compile keeps it whole.

`fusedloss::linear` gives the results and then the gradients that are needed and reduced, so that backward
only scales them; `fusedloss::linear_backward` gives those of unreduced losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import KINDS, LIBRARY, settings
from ..reduce import wide
from .autograd import check_range, redo
from .call import LinearCall, Slot, Slots
from .chunks import run as run_chunks

TENSORS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
TENSORS += "Tensor? sample_weight, Tensor? denominator"
COUNT = 7
FIELDS = ", ".join(f"{KINDS[str(f.type)]} {f.name}" for f in dataclasses.fields(LinearCall))


def run(call: LinearCall, tensors: Slots) -> tuple[Tensor, ...]:
    """The results of the call by its operator."""
    needed = [
        call.reduction != "none" and torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in tensors[: call.gradients]
    ]
    found = torch.ops.fusedloss.linear(*tensors, needed, *settings(call))
    return tuple(found[: _count(call)])


def _count(call: LinearCall) -> int:
    return 4 if call.statistics else 1


def _forward(*arguments: Any) -> list[Tensor]:
    from ..route import count_kernel

    tensors, needed, call = _parts(arguments)
    count_kernel(call.loss)
    if not call.probabilities:
        target = tensors[3]
        check_range(call, tensors, target.squeeze(1) if target.shape[1] == 1 else target)
    results, grads = run_chunks(call, tensors, needed)
    return [*results, *(g for g in grads if g is not None)]


def _parts(arguments: Sequence[Any]) -> tuple[Any, list[bool], LinearCall]:
    return arguments[:COUNT], arguments[COUNT], LinearCall(*arguments[COUNT + 1 :])


def _fake(*arguments: Any) -> list[Tensor]:
    tensors, needed, call = _parts(arguments)
    input, linear_weight = tensors[:2]
    shape = (input.shape[0], linear_weight.shape[1]) if call.reduction == "none" else ()
    results = [input.new_empty(shape, dtype=call.dtype) for _ in range(_count(call))]
    return [*results, *_empty_gradients(tensors, needed)]


def _empty_gradients(tensors: Slots, needed: Sequence[bool]) -> list[Tensor]:
    pairs = enumerate(zip(tensors, needed, strict=False))
    return [
        torch.empty_like(
            t, dtype=t.dtype if k == 3 else wide(t), memory_format=torch.contiguous_format
        )
        for k, (t, need) in pairs
        if need and t is not None
    ]


def _backward(
    incoming: list[Tensor], arrived: list[bool], needed: list[bool], *arguments: Any
) -> list[Tensor]:
    tensors, call = arguments[:COUNT], LinearCall(*arguments[COUNT:])
    given = iter(incoming)
    all_incoming = [next(given) if here else None for here in arrived]
    return [g for g in run_chunks(call, tensors, needed, all_incoming)[1] if g is not None]


def _backward_fake(
    incoming: list[Tensor], arrived: list[bool], needed: list[bool], *arguments: Any
) -> list[Tensor]:
    return _empty_gradients(arguments[:COUNT], needed)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.stored, ctx.call = _parts(inputs)
    ctx.save_for_backward(*tensors, *output[_count(ctx.call) :])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, incoming: list[Slot]) -> tuple[Any, ...]:
    call, needed = ctx.call, list(ctx.needs_input_grad[:4])
    tensors, stored = ctx.saved_tensors[:COUNT], iter(ctx.saved_tensors[COUNT:])
    arriving = incoming[: _count(call)]
    none = (None,) * (COUNT - 4 + 1 + len(dataclasses.fields(call)))
    if torch.is_grad_enabled():
        return (*redo(call, tensors, [*needed, *(False,) * 3], arriving, True)[:4], *none)
    if call.reduction != "none":
        found = [next(stored) if s else None for s in ctx.stored]
        scaled = [g * arriving[0] if g is not None else None for g in found]
    else:
        here = [g is not None for g in arriving]
        given = [g for g in arriving if g is not None]
        operator = torch.ops.fusedloss.linear_backward
        parts = iter(operator(given, here, needed, *tensors, *settings(call)))
        scaled = [next(parts) if need else None for need in needed]
    pairs = zip(scaled, tensors, strict=False)
    return (*(None if g is None else g.to(t.dtype) for g, t in pairs), *none)


LIBRARY.define(f"linear({TENSORS}, bool[] needed, {FIELDS}) -> Tensor[]")
LIBRARY.define(
    f"linear_backward(Tensor[] incoming, bool[] arrived, bool[] needed, {TENSORS}, {FIELDS}) -> Tensor[]"
)
LIBRARY.impl("linear", _forward, "CPU")
LIBRARY.impl("linear_backward", _backward, "CPU")
torch.library.register_fake("fusedloss::linear", _fake, lib=LIBRARY)
torch.library.register_fake("fusedloss::linear_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "fusedloss::linear", _differentiate, setup_context=_keep, lib=LIBRARY
)
