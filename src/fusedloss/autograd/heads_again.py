"""A head like an earlier one, whose logits are one chunk: its plan is kept, and nothing is checked anew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import plain, torch_state
from ..core.plain import Unreadable, is_plain
from ..engines.chunks.straight import Straight, straight
from ..kinds.heads import LinearCall, Slot, Slots, of_one_head
from . import traced
from .functions import learns, named, spanned
from .gradients import redo, scaled
from .saved import Saved, unchanged, unpacked

# Asked at every call or backward: bound here once.
_storage = torch_state.storage
_grad_enabled = torch.is_grad_enabled


def _at(places: Sequence[int], count: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Lays out what is given, and None as the last, as so many: each at its place."""
    at = [places.index(k) if k in places else -1 for k in range(count)]
    return lambda given: tuple([given[k] for k in at])  # dynamo traces no itemgetter


def _layout(given: Slots) -> tuple[Any, ...]:
    """What kernels read tensors by; an assignment to `.data` makes it another one."""
    return tuple(
        [t if t is None else (t.shape, t.dtype, t.is_contiguous(), t.is_cpu) for t in given]
    )


class AgainHead:
    """What of a call stays the same. Its tensors are those that there are, in the order of the call's."""

    def __init__(self, call: LinearCall, given: Slots, needed: Sequence[bool]) -> None:
        self.call, self.needed = call, tuple(needed)  # by the first three tensors of the call
        places = [k for k, t in enumerate(given) if t is not None]
        learned = [k for k, need in enumerate(needed) if need]
        self.inputs, self.learned = len(places), len(learned)
        self.slots = _at(places, len(given))
        self.returned = _at([1 + places.index(k) for k in learned], 1 + len(places))
        self.layout = _layout(given)
        self.shapes = tuple(None if t is None else t.shape for t in given)
        self.stores = bool(learned) and call.stores_gradients
        sign = -1.0 if call.loss == "linear_log_prob" else 1.0
        self.forth = self.back = Straight(call, given, needed if self.stores else (), None, sign)
        if learned and not self.stores:
            assert given[0] is not None
            arriving = given[0].new_empty(self.forth.shape, dtype=call.dtype)
            self.back = Straight(call, given, needed, arriving, sign)
        self.sign = sign
        self.apply = named(_HeadAgain, call.loss)

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Sequence[Tensor]]:
        """The result, and the gradients that are needed."""
        if not all(map(_storage, tensors)):
            raise Unreadable
        return self.forth(self.slots((*tensors, None)))

    def backward(self, tensors: Sequence[Tensor], incoming: Tensor) -> Sequence[Tensor] | None:
        """The gradients of an unreduced loss; None where it takes more."""
        given = self.slots((*tensors, None))
        if not all(map(_storage, tensors)) or _layout(given) != self.layout:
            return None
        return self.back(given, incoming.contiguous())[1]

    def anew(self, given: Slots, incoming: Tensor, create_graph: bool) -> list[Tensor]:
        """The gradients by the formula."""
        pairs = zip(given, self.layout, strict=True)
        with torch.enable_grad():
            own = of_one_head(tuple(t if t is None else t.to(like[1]) for t, like in pairs))
        needed = (*self.needed, *(False,) * (len(own) - len(self.needed)))
        grads = redo(self.call, own, needed, [self.arrived(incoming)], create_graph)
        pairs = zip(grads, given, strict=True)
        return [g.reshape(t.shape) for g, t in pairs if g is not None and t is not None]

    def arrived(self, incoming: Tensor) -> Tensor:
        """At the results of the call."""
        if self.call.reduction != "none":
            return incoming
        return (incoming if self.sign == 1 else -incoming).reshape(-1, 1)


class _HeadAgain(torch.autograd.Function):
    """A head like an earlier one."""

    traced = staticmethod(traced.head)

    @staticmethod
    def forward(ctx: Any, again: AgainHead, *tensors: Tensor) -> Tensor:
        result, grads = again.forward(tensors)
        ctx.again = again
        ctx.save_for_backward(*tensors, *grads)
        return result

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Slot, ...]:
        again: AgainHead = ctx.again
        try:
            saved = ctx.saved_tensors
        except RuntimeError:
            return _by_all_means(ctx, incoming)
        if not _grad_enabled() and is_plain(incoming):
            grads: Sequence[Tensor] | None
            if again.stores:
                grads = scaled(saved[again.inputs :], incoming, True)
            else:
                grads = again.backward(saved, incoming)
            if grads is not None:
                return again.returned((*grads, None))
        return _by_all_means(ctx, incoming)


def _by_all_means(ctx: Any, incoming: Tensor) -> tuple[Slot, ...]:
    again: AgainHead = ctx.again
    create_graph = _grad_enabled()
    plain.check(again.call.loss, incoming=incoming)
    saved = unpacked(ctx)
    stored = saved[again.inputs :]
    if again.stores and not create_graph:
        return again.returned((*scaled(unchanged(stored), incoming, is_plain(incoming)), None))
    given = again.slots((*saved[: again.inputs], None))
    found = Saved(
        *(ctx, again.call, given, again.needed, stored if again.stores else None),
        *(again.forth.shape, again.shapes, -1, True),
    )
    grads = again.anew(tuple(found.settled(create_graph)), incoming, create_graph)
    return again.returned((*grads, None))


def serves(call: LinearCall, tensors: Slots, given: Sequence[Tensor]) -> bool:
    """Whether the call, of the tensors of `kinds/heads.py`, may be repeated with others like those `given`."""
    enabled = learns()
    needed = _needed(tensors)
    stages = ([], needed) if any(needed) and not call.stores_gradients else (needed,)
    return all(straight(call, tensors, stage, None) for stage in stages) and not any(
        not t.is_contiguous() or (enabled and t.is_inference()) for t in given
    )


def _needed(tensors: Slots) -> list[bool]:
    enabled = learns()
    return [enabled and t is not None and t.requires_grad for t in tensors[:3]]


def checked(loss: str, call: LinearCall, tensors: tuple[Tensor, ...]) -> Tensor:
    """Where no plan serves, the call is checked like any."""
    raise Unreadable


def repeater(places: Sequence[int]) -> Callable[..., Callable[..., Tensor]]:
    """What makes of a call, and of its tensors at these places, what runs it again."""

    def prepare(loss: str, call: LinearCall, tensors: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        given = _at(places, len(call.arguments))((*tensors, None))
        again = AgainHead(call, given, _needed(given))
        if again.learned:
            return functools.partial(again.apply, again)

        def unrecorded(*tensors: Tensor) -> Tensor:
            return spanned(loss, lambda: again.forward(tensors)[0])

        return unrecorded

    return prepare
