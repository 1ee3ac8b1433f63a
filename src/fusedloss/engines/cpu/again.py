"""A call like an earlier one: the arguments of its kernel are kept, and only pointers change.

To pack them anew costs more than the arithmetic of a small loss.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core.plain import PLAIN, Unreadable
from ...kinds import Call
from ..abi import FINE, UNREADABLE
from .load import NUMBERS, library

Slot = Tensor | None

_empty_like = torch.empty_like
_data_ptr = Tensor.data_ptr


@dataclass(slots=True)
class Launch:
    """A kernel with all its arguments but the pointers, which `pack` makes ready."""

    run: Callable[[bytes, bytes], int]
    plan: bytes
    pack: Callable[..., bytes]


@dataclass(slots=True)
class Again:
    """A reduced loss of contiguous tensors, whose shapes and types are those of an earlier call."""

    call: Call
    family: ModuleType
    inputs: int  # how many tensors there are
    learned: int  # the first so many need a gradient
    stored: int  # as many gradients forward computes
    absent: tuple[None, ...]  # the tensors that the call lacks
    undefined: tuple[None, ...]  # the gradients of those that need none
    scalar: Tensor  # what the result is like
    shapes: tuple[torch.Size, ...]  # of the tensors
    dtypes: tuple[torch.dtype, ...]
    launch: Launch
    launch_backward: Launch | None
    loss: str = ""
    apply: Any = None  # of the autograd function that bears its name

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and the gradients that forward computes; the family says what is wrong."""
        # The gradients first: the scalar would take the front of the memory that the last ones left.
        grads = tuple(map(_empty_like, tensors[: self.stored])) if self.stored else ()
        result = _empty_like(self.scalar)
        kernel = self.launch
        pointers = map(_data_ptr, (*tensors, result, *grads))
        found = kernel.run(kernel.plan, kernel.pack(*pointers))
        if found != FINE:
            if found == UNREADABLE:
                raise Unreadable
            needed = [k < self.stored for k in range(self.inputs)]
            result, slots = self.family.forward(self.call, self.whole(tensors), needed)
            return result, _present(slots)
        return result, grads

    def fits(self, tensors: Sequence[Tensor], incoming: Tensor) -> bool:
        """Whether the tensors are what the plan says: `.data` and hooks of saved tensors may change them."""
        for tensor, dtype, shape in zip(tensors, self.dtypes, self.shapes, strict=True):
            if not (
                type(tensor) in PLAIN
                and tensor.dtype is dtype
                and tensor.shape == shape
                and tensor.is_contiguous()
                and tensor.is_cpu
                and not tensor.is_neg()
            ):
                return False
        return incoming.dtype is self.scalar.dtype and not incoming.dim()

    def backward(self, tensors: Sequence[Tensor], incoming: Tensor) -> tuple[Tensor, ...] | None:
        """The gradients, where forward computes none; None where the kernel cannot run so."""
        grads = tuple(map(_empty_like, tensors[: self.learned]))
        kernel = self.launch_backward
        assert kernel is not None
        pointers = map(_data_ptr, (*tensors, incoming, *grads))
        if kernel.run(kernel.plan, kernel.pack(*pointers)) != FINE:
            return None
        return grads

    def whole(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """With None for the tensors that the call lacks."""
        return (*tensors, *self.absent)


def _present(grads: Sequence[Slot]) -> tuple[Tensor, ...]:
    return tuple(g for g in grads if g is not None)


def prepare(
    family: ModuleType,
    call: Call,
    tensors: tuple[Slot, ...],
    needed: Sequence[bool],
    stores_gradients: bool,
) -> Again | None:
    """How to repeat this call, if that can be: one without weights."""
    inputs = [t for t in tensors if t is not None]
    places, learned = family.POINTERS, sum(needed)
    if len(inputs) != len(places.inputs):
        return None
    recorded: list[tuple[str, bytes, int]] = []

    def record(kernel: str, loss: str, arguments: bytes, elements: int) -> int:
        recorded.append((kernel, arguments, elements))
        return FINE

    def launch(place: int, output: Tensor, gradients: Sequence[Slot]) -> Launch | None:
        kernel, arguments, elements = recorded.pop()
        words = struct.unpack(f"={len(arguments) // 8}q", arguments)
        grads = _present(gradients)
        if any(g.shape != t.shape for g, t in zip(grads, inputs, strict=False)):
            return None  # it is summed over what was broadcast
        given = (*inputs, output, *grads)
        at = (*places.inputs, place, *places.grads)[: len(given)]
        if any(words[k] != t.data_ptr() for k, t in zip(at, given, strict=True)):
            return None  # the kernel was given a copy
        head = (NUMBERS[kernel], len(words), len(at), *at)
        plan = struct.pack(f"={len(head)}q", *head) + arguments
        return Launch(library(elements).fusedloss_again, plan, struct.Struct(f"={len(at)}q").pack)

    stored = learned if stores_gradients else 0
    result, grads = family.forward(call, tensors, needed if stored else (), record)
    forward, backward = launch(places.total, result, grads), None
    if learned and not stored:
        arriving = torch.ones_like(result)
        grads = family.backward(call, tensors, needed, arriving, record)
        backward = launch(places.incoming, arriving, grads)
    if forward is None or (learned and not stored and backward is None):
        return None
    absent, undefined = len(tensors) - len(inputs), len(inputs) - learned
    return Again(
        call=call,
        family=family,
        inputs=len(inputs),
        learned=learned,
        stored=stored,
        absent=(None,) * absent,
        undefined=(None,) * undefined,
        scalar=result,
        shapes=tuple(t.shape for t in inputs),
        dtypes=tuple(t.dtype for t in inputs),
        launch=forward,
        launch_backward=backward,
    )
