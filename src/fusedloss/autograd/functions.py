"""The autograd functions over all kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from ..core import errors, plain, torch_state
from ..core.plain import is_plain
from ..engines import engine_of, gpu
from ..engines.cpu.again import Again
from ..kinds import Call

T = TypeVar("T", Tensor, "Tensor | None")
R = TypeVar("R")

# Asked at every call or backward: bound here once.
_grad_enabled = torch.is_grad_enabled
_inference = torch.is_inference_mode_enabled
_keeps_graph = torch_state.keeps_graph
_hooks = torch_state.saved_tensor_hooks
_profiling = torch_state.profiling
_span = torch_state.span


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


def repeat(again: Again, tensors: tuple[Any, ...]) -> Tensor:
    """The same, for tensors like those that `prepare` was given."""
    given = tensors[: again.inputs]
    if not again.learned:
        if _profiling():
            return spanned(again.loss, lambda: again.forward(given)[0])
        return again.forward(given)[0]
    if _hooks(True) is not None:  # what is saved may come back as anything
        return run(again.loss, again.call, tensors)
    return _recorded(again.apply, again, given)


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


def prepare(loss: str, call: Call, tensors: tuple[Tensor | None, ...]) -> Again | None:
    """How a call may be repeated at less cost: a reduced loss of contiguous tensors. Or None."""
    enabled = learns()
    needed = [enabled and t is not None and t.requires_grad for t in tensors[: call.gradients]]
    learned = sum(needed)
    if (
        call.reduction == "none"
        or not all(needed[:learned])
        or not all(t is None or (t.is_contiguous() and t.numel()) for t in tensors)
    ):
        return None
    stores = _stores_gradients(call, tensors, needed)
    again: Again | None = engine_of(call, tensors[0]).prepare(call, tensors, needed, stores)
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
    if issubclass(own, _Again):
        # As its own `apply` does it, but for choosing between `backward` and `vjp`: a microsecond.
        own._backward_cls.apply = own.backward  # type: ignore[attr-defined]
        # That is what runs; compiled autograd looks for `backward`, to trace it.
        own.backward = staticmethod(_again_traced)  # type: ignore[method-assign]
    return super(torch.autograd.Function, own).apply  # type: ignore[misc]


class Changed(NamedTuple):
    """In place of a saved tensor that was changed in place: what autograd says, and what it is now."""

    error: RuntimeError
    now: Tensor


def unpacked(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, with a `Changed` for each that autograd refuses to give."""
    try:
        return ctx.saved_tensors
    except RuntimeError:
        if not torch_state.unpacks_saved:
            raise
    return tuple(map(_unpack, ctx._raw_saved_tensors))  # raises where the graph was freed


def _unpack(saved: Any) -> Tensor | Changed | None:
    try:
        return saved.unpack()
    except RuntimeError as error:
        return Changed(error, saved.data.detach())


class _Fused(torch.autograd.Function):
    """A reduced loss computes its gradients in forward, and they wait; others in backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        ctx.call, ctx.stored = call, _stores_gradients(call, tensors, needed)
        result, grads = engine_of(call, tensors[0]).forward(
            call, tensors, needed if ctx.stored else ()
        )
        ctx.save_for_backward(*tensors, *grads)
        ctx.shapes = result.shape, [t if t is None else t.shape for t in tensors]
        ctx.device, ctx.own = result.get_device(), _hooks(True) is None
        return result

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return _traced().fused(ctx, incoming[0])
        needed, saved = ctx.needs_input_grad[1:], unpacked(ctx)
        tensors = saved[: len(needed)]
        stored = saved[len(needed) :] if ctx.stored else None
        shape, shapes = ctx.shapes
        found = _Saved(ctx, ctx.call, tensors, needed, stored, shape, shapes, ctx.device, ctx.own)
        grads = _gradients(found, incoming[0])
        return (None, *grads, *(None,) * (len(tensors) - len(grads)))


@dataclass(slots=True)
class _Saved:
    """What backward finds."""

    node: Any
    call: Call
    tensors: Sequence[Any]  # with a `Changed` for those that are no longer what they were
    needed: Sequence[bool]
    stored: Sequence[Any] | None  # the gradients that forward computed, and more
    shape: torch.Size  # of the loss
    shapes: Sequence[torch.Size | None]  # of the tensors in forward
    device: int  # where they were
    own: bool  # the memory of what is stored is that of forward, and nobody else's

    @property
    def loss(self) -> str:
        name: str = self.node.name()
        return name.removeprefix("fusedloss::").removesuffix("Backward")

    def intact(self) -> bool:
        """Whether a kernel can read the tensors, and they are like those of forward."""
        for tensor, shape in zip(self.tensors, self.shapes, strict=True):
            if tensor is None:
                continue
            if type(tensor) is Changed or plain.gap(tensor):
                return False
            if tensor.shape != shape or tensor.get_device() != self.device:
                return False
        return True

    def settled(self, create_graph: bool) -> list[Tensor | None]:
        """The tensors, if they are still what forward was given, or none of it matters.

        Raises:
            RuntimeError: a tensor was changed in place, has another shape or device, or no memory.
        """
        found: list[Tensor | None] = []
        names = self.call.arguments
        for k, (name, tensor, shape) in enumerate(
            zip(names, self.tensors, self.shapes, strict=True)
        ):
            if type(tensor) is Changed:
                if create_graph or self.call.reads(k, self.needed):
                    self.refuse(name, tensor)
                tensor = tensor.now
            if tensor is not None and (tensor.shape != shape or tensor.get_device() != self.device):
                got = f"{list(tensor.shape)} on {tensor.device}"
                was = f"as {list(shape or ())}, and came back as {got}"
                errors.fail(RuntimeError, self.loss, f"{name} was saved for backward {was}")
            found.append(tensor)
        plain.check(self.loss, **dict(zip(names, found, strict=True)))
        return found

    def refuse(self, name: str, changed: Changed) -> NoReturn:
        if self.stored is None:
            why = (
                "With reduction='none' and in float16 the inputs are kept, and no gradient: change "
                f"a clone() of {name}, or change it after backward()"
            )
        else:
            why = (
                "The gradient was kept, but with create_graph=True it is computed anew, from what "
                f"{name} was: change a clone() of it"
            )
        message = f"{self.loss}: {name} was changed after the loss was taken: {changed.error} {why}"
        raise RuntimeError(message) from changed.error


def _gradients(saved: _Saved, arrived: Tensor) -> Sequence[Tensor | None]:
    """The gradients by the first tensors."""
    readable = is_plain(arrived)
    if not readable:
        plain.check(saved.loss, incoming=arrived)
    if arrived.shape != saved.shape:
        words = (
            f"a gradient of shape {list(arrived.shape)} arrived for a loss of {list(saved.shape)}"
        )
        errors.fail(RuntimeError, saved.loss, words)
    for each in saved.stored or ():
        if type(each) is Changed:
            raise each.error
    if torch.is_grad_enabled():
        return redo(saved.call, saved.settled(create_graph=True), saved.needed, arrived)
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
        with torch.enable_grad():
            found = redo(saved.call, tensors, saved.needed, arrived)
        grads = [g if g is None else g.detach() for g in found]
    for k, grad in enumerate(grads):
        shape = saved.shapes[k]
        if grad is not None and shape is not None and grad.shape != shape:
            grads[k] = grad.sum_to_size(shape)
    return grads


def _from_stored(
    saved: _Saved, stored: Sequence[Any], arrived: Tensor, readable: bool, intact: bool
) -> list[Tensor | None] | None:
    """The gradients that forward computed, scaled; None where they are better computed anew."""
    on_gpu, call = gpu.serves(arrived), saved.call
    if readable and intact:
        if on_gpu:
            return rescaled(call, saved.tensors, stored, arrived, saved.own)
        if not _scales_exactly(stored, arrived):
            return None
    return list(scaled(stored[: call.gradients], arrived, readable and saved.own and not on_gpu))


def _by_kernel(
    saved: _Saved, arrived: Tensor, readable: bool, intact: bool
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
    one = torch.ones(arrived.shape, dtype=arrived.dtype, device=arrived.device)
    spread = call.spread(arrived)
    return [
        None if g is None else g * spread for g in engine.backward(call, tensors, saved.needed, one)
    ]


class _Again(torch.autograd.Function):
    """A call like an earlier one."""

    @staticmethod
    def forward(ctx: Any, again: Any, *tensors: Tensor) -> Tensor:
        result, grads = again.forward(tensors)
        ctx.again = again
        ctx.save_for_backward(*tensors, *grads)
        return result

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        again = ctx.again
        try:
            saved = ctx.saved_tensors
        except RuntimeError:
            return _by_all_means(ctx, incoming)
        if not _grad_enabled() and is_plain(incoming):
            if again.stored:
                stored = saved[again.inputs :]
                if incoming.item() == 1.0 and not _keeps_graph():
                    return (None, *stored, *again.undefined)
                if _scales_exactly(stored, incoming):
                    return (None, *scaled(stored, incoming, True), *again.undefined)
            elif again.fits(saved, incoming):
                grads = again.backward(saved, incoming)
                if grads is not None:
                    return (None, *grads, *again.undefined)
        return _by_all_means(ctx, incoming)


class _AgainOnGpu(_Again):
    """The same where a kernel looks at the scalar that arrives."""

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        again = ctx.again
        try:
            saved = ctx.saved_tensors
        except RuntimeError:
            return _by_all_means(ctx, incoming)
        tensors, stored = saved[: again.inputs], saved[again.inputs :]
        if (
            not _grad_enabled()
            and is_plain(incoming)
            and not (stored and _keeps_graph())
            and again.fits(tensors, incoming)
        ):
            try:
                return (None, *again.backward(tensors, stored, incoming))
            except (gpu.Failed, plain.Unreadable):
                pass  # told below
        return _by_all_means(ctx, incoming)


def _by_all_means(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    """What backward returns for a call like an earlier one that is differentiated otherwise."""
    again, saved = ctx.again, unpacked(ctx)
    tensors, stored = again.whole(saved[: again.inputs]), saved[again.inputs :] or None
    needed = (*ctx.needs_input_grad[1:], *(False for _ in again.absent))
    shapes, result = again.whole(again.shapes), again.scalar
    found = _Saved(
        ctx,
        again.call,
        tensors,
        needed,
        stored,
        result.shape,
        shapes,
        result.get_device(),
        own=True,
    )
    grads = _gradients(found, incoming)
    lacking = (None,) * (again.inputs - len(grads))
    return (None, *grads[: again.inputs], *lacking)


def _traced() -> ModuleType:
    """What compiled autograd traces; it imports this module."""
    from . import traced

    return traced


def _again_traced(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = _traced().again(ctx, incoming)
    return found


def _stores_gradients(call: Call, tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> bool:
    """Whether forward computes the gradients; one of float16, stored before it is scaled, would underflow."""
    return call.stores_gradients and not any(
        need and t is not None and t.dtype is torch.float16
        for t, need in zip(tensors, needed, strict=False)
    )


def _scales_exactly(grads: Sequence[Tensor | None], incoming: Tensor) -> bool:
    """Whether scaling loses nothing that counts; a bfloat16 gradient would be rounded twice."""
    for grad in grads:
        if grad is not None and grad.dtype is torch.bfloat16:
            return abs(math.frexp(incoming.item())[0]) == 0.5
    return True


def scaled(grads: Sequence[T], incoming: Tensor, plain: bool) -> Sequence[T]:
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


def rescaled(
    call: Call,
    tensors: Sequence[Tensor | None],
    stored: Sequence[Tensor | None],
    incoming: Tensor,
    own: bool,
) -> list[Tensor | None]:
    """The same on a GPU, where a kernel looks at the scalar, and computes anew unless it is 1."""
    grads, rest = list(stored[: call.gradients]), stored[call.gradients :]
    if _keeps_graph() or not own:
        grads = [g if g is None else g.clone() for g in grads]
    engine_of(call, tensors[0]).rescale(call, tensors, (*grads, *rest), incoming)
    return grads


def redo(
    call: Call, tensors: Sequence[Any], needed: Sequence[bool], incoming: Tensor
) -> list[Tensor | None]:
    """Gradients that are themselves differentiable, by the formula: for `create_graph=True`."""
    inputs = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
    found = iter(
        torch.autograd.grad(
            call.by_formula(*tensors), inputs, incoming, create_graph=True, materialize_grads=True
        )
    )
    return [next(found) if need else None for need in needed]
