"""The autograd functions over all kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core import plain, torch_state
from ..core.plain import is_plain
from ..engines import engine_of, gpu
from ..engines.again import Again
from ..kinds import Call
from . import traced
from .gradients import gradients, scaled, scales_exactly, stores_gradients
from .saved import Saved, unpacked

R = TypeVar("R")

# Asked at every call or backward: bound here once.
_grad_enabled = torch.is_grad_enabled
_inference = torch.is_inference_mode_enabled
_dispatch_modes = torch_state.dispatch_modes
_keeps_graph = torch_state.keeps_graph
_hooks = torch_state.saved_tensor_hooks
_profiling = torch_state.profiling
_span = torch_state.span
_storage = torch_state.storage


def run(loss: str, call: Call, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """The loss by its kernel, differentiable by the first `call.gradients` tensors."""
    if learns():
        for tensor in tensors[: call.gradients]:
            if tensor is not None and tensor.requires_grad:
                return _recorded(named(_Fused, loss), call, tensors)
    return spanned(loss, lambda: engine_of(call, tensors[0]).forward(call, tensors, ())[0])


def learns() -> bool:
    """Whether autograd records: nothing of inference mode is differentiable, not even by `enable_grad`."""
    return _grad_enabled() and not _inference()


def repeater(
    loss: str, call: Call, tensors: tuple[Tensor | None, ...]
) -> Callable[..., Tensor] | None:
    """What runs such a call again, given its tensors but for the None among these; or None.

    Not where saved tensors have hooks, and may come back as anything.
    """
    again = prepare(loss, call, tensors)
    if again is None:
        return None
    if again.learned:
        return functools.partial(again.apply, again)
    forward, told = again.forward, again.told

    def unrecorded(*tensors: Tensor) -> Any:
        if _profiling():
            return spanned(loss, lambda: (forward(*tensors) or told(tensors))[-1])
        return (forward(*tensors) or told(tensors))[-1]

    return unrecorded


def over(loss: str, call: Call, tensors: tuple[Tensor | None, ...]) -> Callable[..., Tensor] | None:
    """As `repeater`, of a mean over a number that is given before the tensors."""
    again: Any = prepare(loss, call, tensors, over=True)
    if again is None:
        return None
    if again.learned:
        apply = named(_Over, loss)
        return lambda number, *tensors: apply((again, number), *tensors)

    def unrecorded(number: float, *tensors: Tensor) -> Any:
        made = spanned(loss, lambda: again.forward(number, *tensors))
        if made is None:
            raise plain.Unreadable
        return made[-1]

    return unrecorded


def _recorded(apply: Callable[..., Any], first: Any, tensors: tuple[Any, ...]) -> Tensor:
    """What an autograd function gives; of inference tensors, which autograd does not save, with copies."""
    try:
        return apply(first, *tensors)
    except RuntimeError:
        if not any(t is not None and t.is_inference() for t in tensors):
            raise
    copies = (t.clone() if t is not None and t.is_inference() else t for t in tensors)
    return apply(first, *copies)


def spanned(loss: str, compute: Callable[[], R]) -> R:
    """What `compute` gives; a profiler sees it as one event that bears the name of the loss."""
    if not _profiling():
        return compute()
    with _span(f"fusedloss::{loss}"):
        return compute()


def prepare(
    loss: str,
    call: Call,
    tensors: tuple[Tensor | None, ...],
    of: Sequence[Tensor | None] | None = None,
    **more: Any,
) -> Again | None:
    """How a call may be repeated at less cost, or None; `of`: what gradients are wanted by, if others."""
    enabled, learned = learns(), (of or tensors)[: call.gradients]
    needed = [enabled and t is not None and t.requires_grad for t in learned]
    if not all(t is None or (t.numel() and not (enabled and t.is_inference())) for t in tensors):
        return None
    stores = any(needed) and stores_gradients(call, tensors, needed)
    again: Again | None = engine_of(call, tensors[0]).prepare(call, tensors, needed, stores, **more)
    if again is not None:
        kind = _AgainOnGpu if gpu.serves(tensors[0]) else _Again
        again.loss, again.apply = loss, named(kind, loss)
    return again


@functools.cache
def named(kind: type[torch.autograd.Function], loss: str) -> Callable[..., Any]:
    """`apply` of an autograd function whose node bears the name of the loss.

    No transform is active where it is called: what `Function.apply` does for them is left out.
    """
    own = type(f"fusedloss::{loss}", (kind,), {"__module__": __name__})
    if (by_tracing := getattr(own, "traced", None)) is not None:
        torch_state.bare_backward(own, by_tracing)
    return super(torch.autograd.Function, own).apply  # type: ignore[misc]


class _Fused(torch.autograd.Function):
    """A reduced loss computes its gradients in forward, and they wait; others in backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        ctx.call, ctx.stored = call, stores_gradients(call, tensors, needed)
        result, grads = engine_of(call, tensors[0]).forward(
            call, tensors, needed if ctx.stored else ()
        )
        ctx.save_for_backward(*tensors, *grads)
        ctx.shapes = result.shape, [t if t is None else t.shape for t in tensors]
        ctx.device, ctx.own = result.get_device(), _hooks(True) is None
        return result

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch_state.is_compiling():
            return traced.backward(ctx, incoming[0])
        needed, saved = ctx.needs_input_grad[1:], unpacked(ctx)
        tensors = saved[: len(needed)]
        stored = saved[len(needed) :] if ctx.stored else None
        shape, shapes = ctx.shapes
        found = Saved(ctx, ctx.call, tensors, needed, stored, shape, shapes, ctx.device, ctx.own)
        grads = gradients(found, incoming[0])
        return (None, *grads, *(None,) * (len(tensors) - len(grads)))


class _Again(torch.autograd.Function):
    """A call like an earlier one."""

    traced = staticmethod(traced.again)  # what compiled autograd traces for its backward

    @staticmethod
    def forward(ctx: Any, again: Any, *tensors: Tensor) -> Tensor:
        made = again.forward(*tensors) or again.told(tensors)
        ctx.again = again
        ctx.save_for_backward(*tensors, *made[:-1])
        return made[-1]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        again = ctx.again
        try:
            saved = ctx.saved_tensors
            if (
                again.stores
                and type(incoming) is Tensor
                and not (_grad_enabled() or _dispatch_modes() or _keeps_graph())
                and _storage(incoming)
                and incoming.item() == 1.0
            ):
                return again.returned(saved[again.inputs :])
        except RuntimeError:  # what was saved has changed, or what arrives is no number
            return by_all_means(ctx, again, unpacked(ctx), incoming)
        if not _grad_enabled() and (found := at_once(again, saved, incoming)) is not None:
            return found
        return by_all_means(ctx, again, unpacked(ctx), incoming)


class _Over(_Again):
    """The same of a mean over a number of each call."""

    @staticmethod
    def forward(ctx: Any, given: tuple[Any, float], *tensors: Tensor) -> Tensor:
        again, number = given
        made = again.forward(number, *tensors)
        if made is None:
            raise plain.Unreadable  # which is told when all is checked
        ctx.again = again.over(number)
        ctx.save_for_backward(*tensors, *made[:-1])
        return made[-1]


class _AgainOnGpu(_Again):
    """The same where a kernel looks at the scalar that arrives."""

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        again = ctx.again
        try:
            saved = ctx.saved_tensors
        except RuntimeError:
            return by_all_means(ctx, again, unpacked(ctx), incoming)
        tensors, stored = saved[: again.inputs], saved[again.inputs :]
        if (
            not _grad_enabled()
            and is_plain(incoming)
            and not (stored and _keeps_graph())
            and again.fits(tensors, incoming)
        ):
            try:
                return again.returned(again.backward(tensors, stored, incoming))
            except (gpu.Failed, plain.Unreadable):
                pass  # told below
        return by_all_means(ctx, again, unpacked(ctx), incoming)


def at_once(
    again: Any, saved: Sequence[Tensor], incoming: Tensor
) -> tuple[Tensor | None, ...] | None:
    """What backward returns, of the saved tensors and what was stored; None where more has to be looked at."""
    if not again.stores:
        grads = again.backward(saved, incoming)
        return None if grads is None else again.returned(grads)
    if is_plain(incoming):
        stored = saved[again.inputs :]
        if scales_exactly(stored, incoming):
            return again.returned(scaled(stored, incoming, True))
    return None


def by_all_means(
    ctx: Any, again: Again, saved: Sequence[Any], incoming: Tensor
) -> tuple[Tensor | None, ...]:
    """What backward returns for a call like an earlier one that is differentiated otherwise."""
    grads = gradients(found_again(ctx, again, saved), incoming)
    lacking = (None,) * (again.inputs - len(grads))
    return (None, *grads[: again.inputs], *lacking)


def found_again(ctx: Any, again: Again, saved: Sequence[Any]) -> Saved:
    """What backward finds of a call like an earlier one, and its tensors."""
    tensors, stored = again.whole(saved[: again.inputs]), saved[again.inputs :]
    needed = (*ctx.needs_input_grad[1:], *(False for _ in again.absent))
    return Saved(
        ctx,
        again.call,
        tensors,
        needed,
        again.kept(stored) if again.stores else None,
        again.shape,
        again.whole(again.shapes),
        -1 if again.device.type == "cpu" else again.device.index,
        own=True,
    )
