"""The loops over chunks as operators of torch, so that torch.compile keeps them whole.

Each family has two: `fusedloss::<family>` gives the results and then the gradients that are needed and
reduced, so that backward only scales them; `fusedloss::<family>_backward` gives those of unreduced losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import trace
from ..core.indices import check_range
from ..core.reduce import wide
from ..engines.chunks.loop import run as run_chunks
from ..kinds.distill import DistillCall
from ..kinds.heads import LinearCall, Slot, Slots
from . import functions as autograd
from .heads import redo
from .operators import KINDS, define, operator, settings

HEAD = (
    "input",
    "linear_weight",
    "?linear_bias",
    "?target",
    "?weight",
    "?sample_weight",
    "?denominator",
)
TEACHER = ("?teacher_input", "?teacher_weight", "?teacher_bias", "?teacher_logits")


def run(call: LinearCall, tensors: Slots) -> tuple[Tensor, ...]:
    """The results of the call by its operator."""
    needed = [
        call.reduction != "none" and torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in tensors[: call.gradients]
    ]
    found = operator(call.family)(*tensors, needed, *settings(call))
    return tuple(found[: _count(call)])


def _count(call: LinearCall) -> int:
    return 4 if call.statistics else 1


def _empty_gradients(tensors: Slots, needed: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty_like(
            t, dtype=t.dtype if k == 3 else wide(t), memory_format=torch.contiguous_format
        )
        for k, (t, need) in enumerate(zip(tensors, needed, strict=False))
        if need and t is not None
    ]


def gradients(
    call: LinearCall,
    tensors: Slots,
    needed: Sequence[bool],
    stored: Sequence[Slot] | None,
    incoming: Sequence[Slot],
) -> list[Slot]:
    """By the first tensors: those that forward stored, scaled, or those of the operator for backward."""
    if stored is not None:
        assert incoming[0] is not None
        grads = [g if g is None else g * incoming[0] for g in stored]
    else:
        here = [g is not None for g in incoming]
        given = [g for g in incoming if g is not None]
        backward = operator(f"{call.family}_backward")
        each = iter(backward(given, here, list(needed), *tensors, *settings(call)))
        grads = [next(each) if need else None for need in needed]
    pairs = zip(grads, tensors, strict=False)
    return [g if g is None or t is None else g.to(t.dtype) for g, t in pairs]


def _of(saved: Any, reads: bool) -> Slot:
    """A saved tensor, or where it is not read what it is now."""
    if type(saved) is not autograd.Changed:
        return saved
    if reads:
        raise saved.error
    return saved.now


def _define(kind: type[LinearCall], names: tuple[str, ...]) -> None:
    count, name = len(names), kind.family
    tensor_arguments = ", ".join(
        f"Tensor? {n.removeprefix('?')}" if n.startswith("?") else f"Tensor {n}" for n in names
    )
    fields = ", ".join(f"{KINDS[str(f.type)]} {f.name}" for f in dataclasses.fields(kind))
    arguments = f"{tensor_arguments}, {fields}"
    needed_arguments = f"{tensor_arguments}, bool[] needed, {fields}"

    def parts(given: Sequence[Any]) -> tuple[Any, list[bool], LinearCall]:
        return given[:count], given[count], kind(*given[count + 1 :])

    def forward(*given: Any) -> list[Tensor]:
        tensors, needed, call = parts(given)
        trace.by_kernel[call.loss] += 1
        target = tensors[3]
        if target is not None and not call.probabilities:
            own = target.squeeze(1) if target.shape[1] == 1 else target
            check_range(call.loss, own, tensors[1].shape[0], call.ignore_index)
        results, grads = run_chunks(call, tensors, needed)
        return [*(t.contiguous() for t in results), *(g for g in grads if g is not None)]

    def forward_fake(*given: Any) -> list[Tensor]:
        tensors, needed, call = parts(given)
        input, linear_weight = tensors[:2]
        shape = (input.shape[0], linear_weight.shape[1]) if call.reduction == "none" else ()
        results = [input.new_empty(shape, dtype=call.dtype) for _ in range(_count(call))]
        return [*results, *_empty_gradients(tensors, needed)]

    def backward(
        incoming: list[Tensor], arrived: list[bool], needed: list[bool], *given: Any
    ) -> list[Tensor]:
        tensors, call = given[:count], kind(*given[count:])
        arriving = iter(incoming)
        each = [next(arriving) if here else None for here in arrived]
        return [g for g in run_chunks(call, tensors, needed, each)[1] if g is not None]

    def backward_fake(
        incoming: list[Tensor], arrived: list[bool], needed: list[bool], *given: Any
    ) -> list[Tensor]:
        return _empty_gradients(given[:count], needed)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, ctx.stored, ctx.call = parts(inputs)
        # Detached: an output is unpacked by its node alone, and not where an input was changed.
        ctx.save_for_backward(*tensors, *(g.detach() for g in output[_count(ctx.call) :]))
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, incoming: list[Slot]) -> tuple[Any, ...]:
        call, needed = ctx.call, list(ctx.needs_input_grad[: kind.gradients])
        saved = autograd.unpacked(ctx)  # a checkpoint gives them once
        reduced = call.reduction != "none"
        reads = torch.is_grad_enabled() or not reduced
        tensors = tuple(_of(each, reads) for each in saved[:count])
        stored = iter(saved[count:])
        arriving = incoming[: _count(call)]
        none = (None,) * (count - kind.gradients + 1 + len(dataclasses.fields(kind)))
        if torch.is_grad_enabled():
            wanted = [*needed, *(False,) * (count - kind.gradients)]
            return (*redo(call, tensors, wanted, arriving, True)[: kind.gradients], *none)
        kept = [next(stored) if s else None for s in ctx.stored]
        return (*gradients(call, tensors, needed, kept if reduced else None, arriving), *none)

    define(f"{name}({needed_arguments}) -> Tensor[]", forward, forward_fake, differentiate, keep)
    define(
        f"{name}_backward(Tensor[] incoming, bool[] arrived, bool[] needed, {arguments}) -> Tensor[]",
        backward,
        backward_fake,
    )


_define(LinearCall, HEAD)
_define(DistillCall, (*HEAD, *TEACHER))
