"""A call of DTensors like an earlier one: what torch's operations would find out again each time is kept.

One autograd function takes the shards out of the DTensors, runs the kernel, makes the gather that `shards`
makes, and gives the loss, and in backward the gradients, as DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd.functions import at_once, by_all_means, found_again, named, prepare, spanned
from ..autograd.saved import Changed, unchanged, unpacked
from ..core import plain, sharded, torch_state
from ..engines import gpu
from ..engines.again import Again
from ..kinds.torch_m import OutsideDomain
from . import memo, shards
from .memo import Asked

_grad_enabled = torch.is_grad_enabled
_keeps_graph = torch_state.keeps_graph
_profiling = torch_state.profiling
_local = torch_state.local_of
_spec = torch_state.spec_of

Given = tuple[Any, ...]
Slot = Tensor | None


class Whole(NamedTuple):
    """The call of DTensors."""

    call: Any
    # Such a call anew, of what the processes said before.
    run: Callable[[Any, Given, shards.Rows | None], shards.Done]
    check: Callable[[Any, Given], None]


def remember(loss: str, asked: Asked, tensors: Given, done: shards.Done, whole: Whole) -> None:
    """The call may be repeated, where numbers are all that was sent, and no tensor was converted."""
    given = tuple(t for t in tensors if t is not None)
    same = len(given) == len(asked.tensors) and all(map(_is, given, asked.tensors))
    if not (same and asked.make is None and _stays(done, tensors)):
        return
    (result,) = done.results
    kind = type(result)
    if any(sharded.is_sharded(t) and type(t) is not kind for t in given):
        return
    places = [_spec(t) if type(t) is kind else None for t in given]
    learn = [t.requires_grad for t in given]
    local = [_local(t) if type(t) is kind else t for t in given]
    absent = (None,) * (len(tensors) - len(given))
    again = Repeated(
        *(loss, kind, places, learn, torch_state.alike(*local), absent, done, whole),
        *(_spec(result), asked.over),
    )
    run = None if asked.warning or asked.over else again
    known = memo.Known(
        again.alike,
        whole.call,
        absent=(),
        make=None,
        warning=asked.warning,
        on_gpu=False,
        prepare=None,
        unplanned=None,
        repeater=again,
        tried=True,
        run=run,
    )
    memo.keep(loss, asked, known)


def _is(a: Any, b: Any) -> bool:
    return a is b


def _stays(done: shards.Done, tensors: Given) -> bool:
    """Whether the kernel read the DTensors' own memory, and gradients lie as the tensors do."""
    layout, divisor = done.layout, done.divisor
    if layout.classes or not all(map(_is, done.given, done.shards)):
        return False
    if divisor is not None and divisor.counted is not None and divisor.counted.requires_grad:
        return False
    for k, (tensor, shard) in enumerate(zip(tensors, done.shards, strict=True)):
        if tensor is None:
            continue
        if not shard.is_cpu or gpu.serves(shard) or plain.gap(shard):  # errors of a GPU come late
            return False
        if not sharded.is_sharded(tensor):
            if shard is not tensor:
                return False
            continue
        wanted, grads = layout.places(done.axes[k], k)
        if list(tensor.placements) != wanted or (tensor.requires_grad and grads != wanted):
            return False
        if _local(tensor).requires_grad:
            return False
    return True


@dataclass(slots=True)
class Repeated:
    """A call that ran its kernel on the shards, and how to run it again."""

    loss: str
    kind: Any  # DTensor
    places: list[Any]  # of the tensors; None for plain ones
    learn: list[bool]
    locals_alike: Callable[..., bool]
    absent: tuple[None, ...]  # the tensors that the call lacks
    done: shards.Done
    whole: Whole
    place: Any  # of the loss
    over: bool  # a number comes first that a mean is over
    groups: list[Any] = field(init=False)  # that numbers are gathered over
    divides: bool = field(init=False)  # the losses are those of all
    again: Again | None = None
    apply: Any = None
    of_grads: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = self.done.layout
        self.divides = any(layout.splits)
        self.groups = layout.groups if self.done.tells else []
        # What this call was made of may go.
        self.done = self.done._replace(shards=(), given=(), results=())

    def alike(self, *tensors: Any) -> bool:
        """Whether tensors are like those of the call."""
        local = []
        for tensor, place, learns in zip(tensors, self.places, self.learn, strict=True):
            if place is None:
                local.append(tensor)
                continue
            if type(tensor) is not self.kind or tensor.requires_grad is not learns:
                return False
            own = _spec(tensor)
            if own is not place and own != place:
                return False
            local.append(_local(tensor))
        return self.locals_alike(*local)

    def __call__(self, *given: Any) -> Tensor:
        number, tensors = (given[:1], given[1:]) if self.over else ((), given)
        again = self.again or self.prepared(tensors)
        found: Tensor
        if again.learned:
            found = self.apply((self, number), *tensors)
        elif _profiling():
            found = spanned(
                self.loss, lambda: self.forward(number, self.locals(tensors), tensors).loss
            )
        else:
            found = self.forward(number, self.locals(tensors), tensors).loss
        return found

    def prepared(self, tensors: Given) -> Again:
        local = (*self.locals(tensors), *self.absent)
        given = (self.loss, self.done.call, local, (*tensors, *self.absent))
        again = prepare(*given, over=self.over)
        if again is None:
            raise plain.Unreadable
        self.apply = named(_Repeated, self.loss)
        self.again = again
        return again

    def locals(self, tensors: Given) -> list[Tensor]:
        pairs = zip(tensors, self.places, strict=True)
        return [t if place is None else _local(t) for t, place in pairs]

    def forward(self, number: Given, local: Sequence[Tensor], tensors: Given) -> Forward:
        assert self.again is not None
        made = self.again.forward(*number, *local)
        if made is None:
            raise plain.Unreadable  # anew, with the others waiting in the gather
        result: Any = made[-1]
        rows: shards.Rows | None = None
        factor = 1.0
        divisor, call = self.done.divisor, self.whole.call
        if divisor is not None:
            numbers = [result.item()]
            if divisor.counted is not None:
                numbers.append(call.count((*local, *self.absent)).item())
            rows = self.told(numbers, tensors)
            total, factor = divisor.of_numbers(rows)
            result = torch.full((), total, dtype=call.dtype)
            if factor == inf:
                factor = call.of_nothing
        elif self.divides:
            if self.groups:
                rows = self.told([], tensors)
            result = result.contiguous()
        loss = self.kind(result, self.place, requires_grad=False)
        return Forward(loss, made[:-1], rows, factor)

    def told(self, numbers: list[float], tensors: Given) -> shards.Rows:
        """The numbers of all processes; raises what all raise where one could not run."""
        width = len(numbers) + 1
        part = torch.tensor([*numbers, shards.FINE], dtype=torch.float64)
        for group in self.groups:
            told = torch.empty(group.size() * len(part), dtype=torch.float64)
            torch_state.all_gather(group, told, part)
            part = told
        said: list[float] = part.tolist()
        rows = [said[k : k + width] for k in range(0, len(said), width)]
        states = said[width - 1 :: width]
        if any(states):
            whole, given = self.whole, (*tensors, *self.absent)
            with sharded.noted(dict(zip(whole.call.arguments, given, strict=True))):
                try:
                    shards.refuse(self.loss, states, lambda: whole.check(whole.call, given))
                except OutsideDomain:
                    whole.call.refuse(given)
        return rows

    def placed(self, grads: Sequence[Slot]) -> tuple[Any, ...]:
        """As gradients of the tensors."""
        pairs = zip(grads, self.places, strict=True)
        return tuple(
            g if g is None or place is None else self.kind(g, self.like(k, g), requires_grad=False)
            for k, (g, place) in enumerate(pairs)
        )

    def like(self, k: int, grad: Tensor) -> Any:
        """Where torch says that a gradient of tensor k lies that has these strides."""
        key = k, grad.stride()
        if (found := self.of_grads.get(key)) is None:
            with torch.enable_grad():
                leaf = self.kind(grad, self.places[k], requires_grad=True)
                local = leaf.to_local(grad_placements=self.places[k].placements)
                (own,) = torch.autograd.grad(local, leaf, grad)
            found = self.of_grads[key] = _spec(own)
        return found


class Forward(NamedTuple):
    loss: Tensor
    stored: tuple[Any, ...]  # what waits for backward
    rows: shards.Rows | None  # what the processes said
    factor: float  # what scales gradients


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: tuple[Repeated, Given], *tensors: Tensor) -> Tensor:
        of, number = given
        local = of.locals(tensors)
        found = of.forward(number, local, tensors)
        again: Any = of.again
        ctx.again = again.over(*number) if number else again
        ctx.of, ctx.number, ctx.rows, ctx.factor = of, number, found.rows, found.factor
        ctx.versions = [t._version for t in local]
        ctx.save_for_backward(*found.stored, *tensors)
        return found.loss

    @staticmethod
    def backward(ctx: Any, incoming: Any) -> tuple[Slot, ...]:
        of = ctx.of
        again: Again = ctx.again
        if _grad_enabled() or type(incoming) is not of.kind:
            return None, *_anew(ctx, incoming)
        if incoming.placements != of.place.placements:
            incoming = incoming.redistribute(of.place.mesh, of.place.placements)
        arrived = _local(incoming)
        if again.stores and ctx.factor == 1.0 and arrived.item() == 1.0 and not _keeps_graph():
            stored: Any = unchanged(unpacked(ctx)[: -len(of.places)])
            return None, *of.placed(again.returned(stored)[1:])
        if of.done.divisor is not None:
            arrived = arrived.to(torch.float64) * ctx.factor
        saved = _saved(ctx)
        grads = None
        if not any(type(t) is Changed for t in saved):
            grads = at_once(again, saved, arrived)
        return None, *of.placed((grads or by_all_means(ctx, again, saved, arrived))[1:])


def _saved(ctx: Any) -> list[Any]:
    """The shards and what was stored."""
    saved, places = unpacked(ctx), ctx.of.places
    found: list[Any] = []
    for tensor, place, version in zip(saved[-len(places) :], places, ctx.versions, strict=True):
        local = tensor if place is None or type(tensor) is Changed else _local(tensor)
        if type(local) is not Changed and local._version != version:
            words = (
                "its shard, needed for gradient computation, was modified by an inplace operation"
            )
            local = Changed(RuntimeError(words), local)
        found.append(local)
    return [*found, *saved[: -len(places)]]


def _anew(ctx: Any, incoming: Tensor) -> list[Slot]:
    """The gradients by the whole call, which torch may differentiate."""
    of, needed, create_graph = ctx.of, ctx.needs_input_grad[1:], _grad_enabled()
    found_again(ctx, ctx.again, _saved(ctx)).settled(create_graph=True)
    call = replace(of.whole.call, denominator=ctx.number[0]) if of.over else of.whole.call
    tensors = list(ctx.saved_tensors[-len(of.places) :])
    with torch.enable_grad():
        if not create_graph:
            pairs = zip(tensors, needed, strict=True)
            tensors = [t.detach().requires_grad_(need) for t, need in pairs]
        (loss,) = of.whole.run(call, (*tensors, *of.absent), ctx.rows).results
        learned = [t for t, need in zip(tensors, needed, strict=True) if need]
        grads = torch.autograd.grad(
            loss, learned, incoming, create_graph=create_graph, allow_unused=True
        )
    found = iter(grads)
    return [next(found) if need else None for need in needed]
