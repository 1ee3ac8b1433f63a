"""Gradients in backward: those that forward stored, scaled; by a kernel; or by the formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core import errors, plain, torch_state
from ..core.plain import is_plain
from ..engines import engine_of, gpu
from ..kinds import Call
from ..kinds.heads import LinearCall
from .saved import Saved, unchanged

FEW = 4096  # elements
T = TypeVar("T", Tensor, "Tensor | None")

_keeps_graph = torch_state.keeps_graph


def stores_gradients(call: Call, tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> bool:
    """Whether forward computes the gradients; one of float16, stored before it is scaled, would underflow.

    Few are stored in any case: that costs less than to run another kernel.
    """
    first = tensors[0]
    few = first is not None and first.numel() <= FEW and not gpu.serves(first)
    stores = call.stores_gradients or (few and call.reduction != "none")
    return stores and not any(
        need and t is not None and t.dtype is torch.float16
        for t, need in zip(tensors, needed, strict=False)
    )


def scales_exactly(grads: Sequence[Tensor | None], incoming: Tensor) -> bool:
    """Whether scaling loses nothing that counts; a bfloat16 gradient would be rounded twice."""
    for grad in grads:
        if grad is not None and grad.dtype is torch.bfloat16:
            return abs(math.frexp(incoming.item())[0]) == 0.5
    return True


def scaled(grads: Sequence[T], incoming: Tensor, plain: bool = False) -> Sequence[T]:
    """The stored gradients times the scalar that arrives, which may be `plain`.

    The stored tensors themselves are given away only when the graph is freed: another backward would
    otherwise find them changed by whoever accumulates into them.
    """
    if not plain or _keeps_graph():
        return [g if g is None else g * incoming for g in grads]
    if incoming.item() != 1.0:
        for grad in grads:
            if grad is not None:
                grad.mul_(incoming)
    return grads


def redo(
    call: Call | LinearCall,
    tensors: Sequence[Any],
    needed: Sequence[bool],
    incoming: Sequence[Tensor | None],
    create_graph: bool = True,
) -> list[Tensor | None]:
    """Gradients by the formula: for `create_graph=True`, and for what no kernel reads."""
    with torch.enable_grad():
        inputs = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
        results = call.by_formula(*tensors)
        each = results if isinstance(results, tuple) else (results,)
        pairs = zip(each, incoming, strict=True)
        outputs, arriving = zip(*((t, g) for t, g in pairs if g is not None), strict=True)
        found = iter(
            torch.autograd.grad(
                outputs, inputs, arriving, create_graph=create_graph, materialize_grads=True
            )
        )
    return [next(found) if need else None for need in needed]


def gradients(saved: Saved, arrived: Tensor) -> Sequence[Tensor | None]:
    """The gradients by the first tensors, for the one that arrives at the result."""
    readable = is_plain(arrived)
    if not readable:
        plain.check(saved.loss, incoming=arrived)
        if arrived.is_neg():  # a sign is all that the kernel lacks
            arrived = arrived.resolve_neg()
            readable = is_plain(arrived)
    if arrived.shape != saved.shape:
        words = (
            f"a gradient of shape {list(arrived.shape)} arrived for a loss of {list(saved.shape)}"
        )
        errors.fail(RuntimeError, saved.loss, words)
    unchanged(saved.stored or ())
    if torch.is_grad_enabled():
        return redo(saved.call, saved.settled(create_graph=True), saved.needed, [arrived])
    intact = saved.intact()
    grads: list[Tensor | None] | None = None
    try:
        if saved.stored is not None:
            grads = _from_stored(saved, saved.stored, arrived, readable, intact)
        if grads is None:
            grads = _by_kernel(saved, arrived, readable, intact)
    except gpu.Failed as failed:
        gpu.turn_off(failed, saved.call.family)
    if grads is None:
        tensors = saved.settled(create_graph=True)
        grads = redo(saved.call, tensors, saved.needed, [arrived], create_graph=False)
    for k, grad in enumerate(grads):
        shape = saved.shapes[k]
        if grad is not None and shape is not None and grad.shape != shape:
            grads[k] = grad.sum_to_size(shape)
    return grads


def _from_stored(
    saved: Saved, stored: Sequence[Any], arrived: Tensor, readable: bool, intact: bool
) -> list[Tensor | None] | None:
    """The gradients that forward computed, scaled; None where they are better computed anew."""
    on_gpu, call = gpu.serves(arrived), saved.call
    grads, rest = stored[: call.gradients], stored[call.gradients :]
    if readable and intact:
        if on_gpu:  # a kernel looks at the scalar, and computes anew unless it is 1
            if _keeps_graph() or not saved.own:
                grads = [g if g is None else g.clone() for g in grads]
            engine = engine_of(call, saved.tensors[0])
            engine.rescale(call, saved.tensors, (*grads, *rest), arrived)
            return list(grads)
        if not scales_exactly(stored, arrived):
            return None
    return list(scaled(grads, arrived, readable and saved.own and not on_gpu))


def _by_kernel(
    saved: Saved, arrived: Tensor, readable: bool, intact: bool
) -> list[Tensor | None] | None:
    """The gradients computed anew; None where no kernel reads the tensors."""
    call, tensors = saved.call, saved.tensors
    if not intact:
        tensors = saved.settled(create_graph=False)
        if any(t is not None and plain.gap(t) for t in tensors):
            return None
    engine = engine_of(call, tensors[0])
    if readable:
        return engine.backward(call, tensors, saved.needed, arrived)
    if call.reduction == "none" and not call.separable:
        return None
    one = torch.ones(arrived.shape, dtype=arrived.dtype, device=arrived.device)
    grads = engine.backward(call, tensors, saved.needed, one)
    return list(scaled(grads, call.spread(arrived)))
