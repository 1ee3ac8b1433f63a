"""The kernels of the row losses as operators of torch, so that torch.compile keeps them whole.

Each family has three. The arguments of `fusedloss::<family>` and `fusedloss::<family>_backward` are the
tensors of its call and then the settings, field by field. `fusedloss::<family>_with_gradients` is for
reduced losses and gives the gradients too: what is changed before backward does not reach them. The only
overload of each is named by our version: a cached graph keeps the strides that it was compiled for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core import caches, trace
from ..core.torch_state import differentiating
from ..engines import engine_of, gpu
from ..kinds import Call
from ..kinds.rows import RowsCall
from ..kinds.triplet import TripletCall
from . import functions as autograd

KINDS = {
    "str": "str",
    "bool": "bool",
    "int": "SymInt",
    "float": "float",
    "torch.dtype": "ScalarType",
}
TENSORS = {
    RowsCall: ("Tensor input", "Tensor target", "Tensor? weight"),
    TripletCall: ("Tensor anchor", "Tensor positive", "Tensor negative"),
}
WIDE = (torch.float32, torch.float64)
T = TypeVar("T")
LIBRARY = torch.library.Library("fusedloss", "DEF")
OVERLOAD = f"v{caches.VERSION}"


def settings(call: Any) -> tuple[Any, ...]:
    return tuple(getattr(call, field.name) for field in dataclasses.fields(call))


def operator(name: str) -> Any:
    return getattr(getattr(torch.ops.fusedloss, name), OVERLOAD)


def define(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    keep: Callable[..., Any] | None = None,
) -> None:
    """The operator of a schema, with its kernel for every device."""
    name, arguments = schema.split("(", 1)
    name = f"{name}.{OVERLOAD}"
    LIBRARY.define(f"{name}({arguments}")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, forward, key)
    torch.library.register_fake(f"fusedloss::{name}", fake, lib=LIBRARY)
    if differentiate:
        torch.library.register_autograd(
            f"fusedloss::{name}", differentiate, setup_context=keep, lib=LIBRARY
        )


def run(call: Call, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """The loss by its operator: what `autograd.run` is to eager calls."""
    needed = [t is not None and t.requires_grad for t in tensors[: call.gradients]]
    found: Tensor
    if torch.is_grad_enabled() and any(needed) and _stores(call, tensors, needed):
        name = f"{call.family}_with_gradients"
        found, *_ = operator(name)(*tensors, needed, *settings(call))
    else:
        found = operator(call.family)(*tensors, *settings(call))
    return found


def _stores(call: Call, tensors: tuple[Tensor | None, ...], needed: list[bool]) -> bool:
    """Whether forward computes the gradients; half-typed ones would be rounded twice."""
    return call.stores_gradients and all(
        t is not None and t.dtype in WIDE for t, need in zip(tensors, needed, strict=False) if need
    )


def _unless_triton_fails(
    family: str, tensor: Tensor, kernel: Callable[[], T], formula: Callable[[], T]
) -> T:
    """As `dispatch` does, for a graph that was compiled with the operator in it."""
    if not (gpu.serves(tensor) and gpu.problem(family)):
        try:
            return kernel()
        except gpu.Failed as failed:
            gpu.turn_off(failed, family)
    return formula()


def _gradients_by_formula(
    call: RowsCall | TripletCall, tensors: tuple[Any, ...], needed: list[bool], incoming: Tensor
) -> list[Tensor | None]:
    with differentiating():
        pairs = zip(tensors, needed, strict=True)
        leaves = [t.detach().requires_grad_() if need else t for t, need in pairs]
        grads = autograd.redo(call, leaves, needed, incoming)
    # Laid out as the graph that called expects it.
    found = zip(grads, tensors, strict=False)
    return [g if g is None else call.empty_gradient(t).copy_(g.detach()) for g, t in found]


def _define(kind: type[RowsCall] | type[TripletCall]) -> None:
    name, count = kind.family, len(TENSORS[kind])
    fields = [f"{KINDS[str(field.type)]} {field.name}" for field in dataclasses.fields(kind)]
    arguments = ", ".join([*TENSORS[kind], *fields])

    def forward(*arguments: Any) -> Tensor:
        call, tensors = kind(*arguments[count:]), arguments[:count]
        trace.by_kernel[call.loss] += 1
        return _unless_triton_fails(
            call.family,
            tensors[0],
            lambda: engine_of(call, tensors[0]).forward(call, tensors, ())[0],
            lambda: call.by_formula(*tensors).contiguous(),
        )

    def forward_fake(*arguments: Any) -> Tensor:
        call, tensors = kind(*arguments[count:]), arguments[:count]
        shape = call.shape(*tensors) if call.reduction == "none" else ()
        return tensors[0].new_empty(shape, dtype=call.dtype)

    def backward(incoming: Tensor, needed: list[bool], *arguments: Any) -> list[Tensor]:
        call, tensors = kind(*arguments[count:]), arguments[:count]
        grads = _unless_triton_fails(
            call.family,
            tensors[0],
            lambda: engine_of(call, tensors[0]).backward(call, tensors, needed, incoming),
            lambda: _gradients_by_formula(call, tensors, needed, incoming),
        )
        pairs = zip(grads, tensors, strict=False)
        return [g.sum_to_size(t.shape) for g, t in pairs if g is not None]

    def backward_fake(incoming: Tensor, needed: list[bool], *arguments: Any) -> list[Tensor]:
        call, tensors = kind(*arguments[count:]), arguments[:count]
        pairs = zip(tensors, needed, strict=True)
        return [call.empty_gradient(t) for t, need in pairs if need]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call = kind(*inputs[count:])
        ctx.save_for_backward(*inputs[:count])

    def differentiate(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:count]
        if torch.is_grad_enabled():
            grads = autograd.redo(ctx.call, ctx.saved_tensors, needed, incoming)
        else:
            given = (incoming, needed, *ctx.saved_tensors, *settings(ctx.call))
            found = iter(operator(f"{name}_backward")(*given))
            grads = [next(found) if need else None for need in needed]
        return (*grads, *(None,) * len(fields))

    def both(*given: Any) -> list[Tensor]:
        tensors, needed, call = given[:count], given[count], kind(*given[count + 1 :])
        trace.by_kernel[call.loss] += 1

        def by_formula() -> tuple[Tensor, list[Tensor | None]]:
            result = call.by_formula(*tensors).contiguous()
            wanted = [*needed, *(False,) * (count - len(needed))]
            return result, _gradients_by_formula(call, tensors, wanted, torch.ones_like(result))

        result, grads = _unless_triton_fails(
            call.family,
            tensors[0],
            lambda: engine_of(call, tensors[0]).forward(call, tensors, needed),
            by_formula,
        )
        pairs = zip(grads[: call.gradients], tensors, strict=False)
        return [result, *(g.sum_to_size(t.shape) for g, t in pairs if g is not None)]

    def both_fake(*given: Any) -> list[Tensor]:
        tensors, needed, call = given[:count], given[count], kind(*given[count + 1 :])
        grads = [call.empty_gradient(t) for t, need in zip(tensors, needed, strict=False) if need]
        return [tensors[0].new_empty((), dtype=call.dtype), *grads]

    def keep_both(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.stored, ctx.call = inputs[count], kind(*inputs[count + 1 :])
        # Detached: an output is unpacked by its node alone, and not where an input was changed.
        ctx.save_for_backward(*inputs[:count], *(g.detach() for g in output[1:]))
        ctx.set_materialize_grads(False)

    def scale(ctx: Any, incoming: list[Tensor | None]) -> tuple[Any, ...]:
        needed, arrived = ctx.needs_input_grad[:count], incoming[0]
        saved = autograd.unpacked(ctx)
        grads: list[Tensor | None] = [None] * count
        if arrived is not None and torch.is_grad_enabled():
            for each in saved[:count]:
                if type(each) is autograd.Changed:
                    raise each.error
            grads = autograd.redo(ctx.call, saved[:count], needed, arrived)
        elif arrived is not None:
            found = iter(saved[count:])
            for k, stored in enumerate(ctx.stored):
                grads[k] = next(found) * arrived if stored else None
        return (*grads, *(None,) * (1 + len(fields)))

    define(f"{name}({arguments}) -> Tensor", forward, forward_fake, differentiate, keep)
    define(
        f"{name}_with_gradients({', '.join(TENSORS[kind])}, bool[] needed, {', '.join(fields)}) -> Tensor[]",
        both,
        both_fake,
        scale,
        keep_both,
    )
    define(
        f"{name}_backward(Tensor incoming, bool[] needed, {arguments}) -> Tensor[]",
        backward,
        backward_fake,
    )


for _kind in TENSORS:
    _define(_kind)
