"""A call like an earlier one on a GPU: its launches are kept, and only pointers change.

To lay out arguments, and Triton's own way from them to a compiled kernel, take longer than small losses.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ...core import torch_state
from ...core.plain import PLAIN, Unreadable
from ...kinds import Call
from ..again import Again, common
from ..plan import Slot
from ..protocol import Engine
from . import flags, launch
from .available import Failed

_empty_like = torch.empty_like
_data_ptr = Tensor.data_ptr
ALIGNED = 15  # Triton compiles for pointers that are multiples of 16, or not
LOWEST = 1 << 22  # below lies no memory: null, or an offset from it


@dataclass(slots=True)
class Launch:
    """A launch with all its arguments but the tensors, which are numbered by where they come from."""

    kernel: Any
    programs: int
    names: list[str]
    values: list[Any]
    places: list[tuple[int, int]]
    settings: dict[str, Any]
    compiled: Any  # None where Triton interprets

    def __call__(self, stream: int, pointers: list[int]) -> None:
        values = self.values.copy()
        for at, source in self.places:
            values[at] = pointers[source]
        known = self.compiled
        # No metadata for hooks, and no hooks.
        known.run(
            self.programs, 1, 1, stream, known.function, known.packed_metadata, None, None, None, *values
        )  # fmt: skip

    def interpret(self, sources: Sequence[Tensor]) -> None:
        values = self.values.copy()
        for at, source in self.places:
            values[at] = sources[source]
        arguments = dict(zip(self.names, values, strict=True))
        launch.run(self.kernel, self.programs, {**arguments, **self.settings})


@dataclass(slots=True, kw_only=True)
class AgainOnGpu(Again):
    """Of a reduced loss of contiguous tensors, the first of which learn."""

    result: Tensor  # what the result is like
    dtypes: tuple[torch.dtype, ...]
    rest: tuple[Slot, ...]  # after the slots of gradients, what forward gives beside them
    make: Callable[[Tensor], Tensor]  # of a gradient from its input
    launches: list[Launch]
    scratch: list[Tensor]  # like the memory that these need
    launches_backward: list[Launch]
    scratch_backward: list[Tensor]

    def run(self, *tensors: Tensor) -> tuple[Slot, ...] | None:
        """What `forward` gives."""
        flags.raise_pending(self.device)
        grads = self.gradients(tensors) if self.stores else ()
        result = _empty_like(self.result)
        rest = tuple(t if t is None else _empty_like(t) for t in self.rest)
        made = (t for t in rest if t is not None)
        scratch = map(_empty_like, self.scratch)
        if not self.launch(self.launches, (*tensors, result, *grads, *made, *scratch)):
            return None
        return (*self.all_slots(grads), *rest, result) if self.stores else (result,)

    def told(self, tensors: Sequence[Tensor]) -> tuple[Slot, ...]:
        needed = [self.stores and k < self.learned for k in range(self.call.gradients)]
        result, slots = self.engine.forward(self.call, self.whole(tensors), needed)
        return (*slots, result) if self.stores else (result,)

    def backward(
        self, tensors: Sequence[Tensor], stored: Sequence[Slot], incoming: Tensor
    ) -> Sequence[Tensor]:
        """The gradients that are needed; those that forward stored become those for `incoming`."""
        flags.raise_pending(self.device)
        slots = self.call.gradients
        if self.stores:
            grads = [g for g in stored[:slots] if g is not None]
        else:
            grads = list(self.gradients(tensors))
        made = (t for t in stored[slots:] if t is not None)
        scratch = map(_empty_like, self.scratch_backward)
        sources = (*tensors, incoming, *grads, *made, *scratch)
        if not self.launch(self.launches_backward, sources):
            whole = self.whole(tensors)
            if self.stores:
                self.engine.rescale(self.call, whole, stored, incoming)
            else:
                needed = [k < self.learned for k in range(slots)]
                found = self.engine.backward(self.call, whole, needed, incoming)
                grads = [g for g in found if g is not None]
        return grads

    def launch(self, launches: list[Launch], sources: tuple[Tensor, ...]) -> bool:
        """Whether all could be launched as they are."""
        pointers = list(map(_data_ptr, sources))
        if min(pointers[: self.inputs + 1]) < LOWEST:  # and of what arrives, in backward
            raise Unreadable
        if launches[0].compiled is None:
            for each in launches:
                each.interpret(sources)
            return True
        index = self.device.index
        bits = functools.reduce(operator.or_, pointers)
        if bits & ALIGNED or torch_state.current_gpu() != index or hooked():
            return False
        stream = torch_state.current_stream(index)
        for each in launches:
            each(stream, pointers)
        return True

    def gradients(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(map(self.make, tensors[: self.learned]))

    def kept(self, stored: Sequence[Slot]) -> Sequence[Slot]:
        return stored

    def all_slots(self, grads: Sequence[Tensor]) -> tuple[Slot, ...]:
        """With None for those that nothing needs, or that there are not."""
        return (*grads, *(None,) * (self.call.gradients - len(grads)))

    def fits(self, tensors: Sequence[Tensor], incoming: Tensor) -> bool:
        """Whether the tensors are what the plan says: `.data` and hooks of saved tensors may change them."""
        for tensor, dtype, shape in zip(tensors, self.dtypes, self.shapes, strict=True):
            if not (
                type(tensor) in PLAIN
                and tensor.dtype is dtype
                and tensor.shape == shape
                and tensor.device == self.device
                and tensor.is_contiguous()
                and not tensor.is_neg()
            ):
                return False
        return incoming.dtype is self.result.dtype and not incoming.dim()


def hooked() -> bool:
    """Whether a profiler wants to know of each launch."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def prepare(
    engine: Engine[Any],
    call: Call,
    tensors: tuple[Slot, ...],
    needed: Sequence[bool],
    stores_gradients: bool,
) -> AgainOnGpu | None:
    """How to repeat this call, if that can be."""
    inputs = [t for t in tensors if t is not None]
    learned, slots = sum(needed), call.gradients
    if (
        call.reduction == "none"
        or call.counts
        or not all(needed[:learned])
        or not all(t.is_contiguous() for t in inputs)
    ):
        return None
    stores = bool(learned) and stores_gradients
    try:
        with launch.taped() as tape:
            result, found = engine.forward(call, tensors, needed if stores else ())
        grads, rest = [g for g in found[:slots] if g is not None], tuple(found[slots:])
        made = [t for t in rest if t is not None and stores]
        tape.scratch = [t for t in tape.scratch if not any(t is m for m in made)]
        launches = _kept(tape, (*inputs, result, *grads, *made))
        backward: list[Launch] | None = []
        tape_backward = launch.Tape()
        if learned:
            arriving = torch.empty_like(result)
            with launch.taped() as tape_backward:
                if stores:
                    engine.rescale(call, tensors, found, arriving)
                else:
                    given = engine.backward(call, tensors, needed, arriving)
                    grads = [g for g in given if g is not None]
            backward = _kept(tape_backward, (*inputs, arriving, *grads, *made))
    except Failed:
        return None
    if not launches or backward is None:
        return None
    if any(
        g.shape != t.shape or not g.is_contiguous() for g, t in zip(grads, inputs, strict=False)
    ):
        return None
    known = common(call, inputs, len(tensors), needed, stores, result)
    again = AgainOnGpu(
        forward=lambda *_: None,
        engine=engine,
        result=result,
        dtypes=tuple(t.dtype for t in inputs),
        rest=rest if stores else (),
        make=torch.zeros_like if call.name == "rows/nll_loss" else _empty_like,
        launches=launches,
        scratch=tape.scratch,
        launches_backward=backward,
        scratch_backward=tape_backward.scratch,
        **known,
    )
    again.forward = again.run
    return again


def _kept(tape: launch.Tape, sources: tuple[Tensor, ...]) -> list[Launch] | None:
    """The launches with their tensors numbered by `sources` and then the scratch, if all are found there."""
    numbers = {t.data_ptr(): k for k, t in enumerate((*sources, *tape.scratch))}
    kept = []
    for kernel, programs, arguments in tape.launches:
        names = list(kernel.arg_names)
        values = [arguments[name] for name in names]
        places = []
        for at, (name, value) in enumerate(zip(names, values, strict=True)):
            if not isinstance(value, Tensor) or name in ("claim", "words"):
                continue
            if (number := numbers.get(value.data_ptr())) is None:
                return None  # a copy, or a weight that was converted
            places.append((at, number))
        settings = {k: v for k, v in arguments.items() if k not in names}
        compiled = launch.ready(kernel, programs, arguments)
        for at, _ in places:
            values[at] = None
        kept.append(Launch(kernel, programs, names, values, places, settings, compiled))
    return kept
