"""Kernels, and the loops over chunks, as operators of torch, so that torch.compile keeps them whole.

Each kind of call has two. The arguments of `fusedloss::<family>` are the tensors of the call, which gradients
are to be stored, and the settings, field by field; it gives the results and those gradients: what is changed
before backward does not reach them, and backward only scales them, by `fusedloss::scaled`; one of bfloat16 by
`fusedloss::<family>_scaled`, which computes it anew where it would be rounded twice.
`fusedloss::<family>_backward` gives those of unreduced losses. The only overload of each is named by our
version: a cached graph keeps the strides that it was compiled for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core import caches, inductor, shards, torch_state, trace
from ..core.torch_state import differentiating
from ..engines import engine_of, gpu
from ..engines.chunks.loop import run as run_chunks
from ..kinds.ctc import CtcCall
from ..kinds.dice import DiceCall
from ..kinds.distill import DistillCall
from ..kinds.formula import FORMULAS
from ..kinds.heads import LinearCall
from ..kinds.logits import LogitsCall
from ..kinds.margins import MarginCall
from ..kinds.pointwise import PointwiseCall
from ..kinds.reduction import ReductionCall
from ..kinds.rows import RowsCall
from ..kinds.torch_m import OutsideDomain
from .gradients import redo, scales_exactly
from .saved import Changed, unpacked

KINDS = {
    "str": "str",
    "bool": "bool",
    "int": "SymInt",
    "int | None": "SymInt?",
    "float": "float",
    "float | None": "float?",
    "torch.dtype": "ScalarType",
    "tuple[float, ...]": "float[]",
    "Pointwise": "str",  # by its name
    "ClassShard | None": "str",
}
HEAD = (
    "Tensor input",
    "Tensor linear_weight",
    "Tensor? linear_bias",
    "Tensor? target",
    "Tensor? weight",
    "Tensor? sample_weight",
    "Tensor? denominator",
)
TEACHER = (
    "Tensor? teacher_input",
    "Tensor? teacher_weight",
    "Tensor? teacher_bias",
    "Tensor? teacher_logits",
)
TENSORS: dict[type[Any], tuple[str, ...]] = {
    PointwiseCall: (
        "Tensor first",
        "Tensor second",
        "Tensor? third",
        "Tensor? fourth",
        "Tensor? weight",
    ),
    RowsCall: ("Tensor input", "Tensor target", "Tensor? weight"),
    DiceCall: ("Tensor input", "Tensor target", "Tensor? weight"),
    ReductionCall: ("Tensor first", "Tensor second", "Tensor? third"),
    CtcCall: (
        "Tensor log_probs",
        "Tensor targets",
        "Tensor input_lengths",
        "Tensor target_lengths",
    ),
    MarginCall: ("Tensor input", "Tensor target", "Tensor? weight"),
    LinearCall: HEAD,
    LogitsCall: HEAD,
    DistillCall: (*HEAD, *TEACHER),
}
WIDE = (torch.float32, torch.float64)
LIBRARY = torch.library.Library("fusedloss", "DEF")
OVERLOAD = f"v{caches.version()}"
Slot = Tensor | None
T = TypeVar("T")


def settings(call: Any) -> tuple[Any, ...]:
    return tuple(_setting(getattr(call, f.name), str(f.type)) for f in dataclasses.fields(call))


def _setting(value: Any, kind: str) -> Any:
    if kind == "Pointwise":
        return value.name
    return str(value or "") if kind == "ClassShard | None" else value


def _field(value: Any, kind: str) -> Any:
    """The same the other way."""
    if kind == "Pointwise":
        return FORMULAS[value]
    return shards.parsed(value) if kind == "ClassShard | None" else value


def arguments(call: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Of the call's tensors; None for the operands that its formula lacks, which are before the last."""
    lacking = len(TENSORS[type(call)]) - len(tensors)
    return (*tensors[:-1], *(None,) * lacking, tensors[-1])


def operator(name: str) -> Any:
    return getattr(getattr(torch.ops.fusedloss, name), OVERLOAD)


def run(call: Any, tensors: Sequence[Slot]) -> tuple[Tensor, ...]:
    """The results of a call by its operator."""
    needed = [t is not None and t.requires_grad for t in tensors[: call.gradients]]
    if not (torch.is_grad_enabled() and _stores(call, tensors, needed)):
        needed = [False] * len(needed)
    found = operator(call.family)(*arguments(call, tensors), needed, *settings(call))
    return tuple(found[: call.outputs])


def _stores(call: Any, tensors: Sequence[Slot], needed: Sequence[bool]) -> bool:
    """Whether forward computes the gradients; half-typed ones are rounded once."""
    if isinstance(call, LinearCall):  # they are of float32
        return call.stores_gradients
    learned = [t for t, need in zip(tensors, needed, strict=False) if need and t is not None]
    alone = len(learned) == 1 and rescales(learned[0])
    return call.stores_gradients and (alone or all(t.dtype in WIDE for t in learned))


def rescales(tensor: Tensor) -> bool:
    """Whether a gradient like this one is stored and, unless 1 or a power of 2 arrives, computed anew."""
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu"


def _rescales(call: Any, stored: Sequence[Slot]) -> bool:
    """Whether one of those that are stored is such."""
    return not isinstance(call, LinearCall) and any(g is not None and rescales(g) for g in stored)


def _rescaled(
    call: Any, tensors: Sequence[Slot], needed: Sequence[bool], stored: Sequence[Slot], by: Tensor
) -> list[Slot]:
    scale, slots, own = operator(f"{call.family}_scaled"), arguments(call, tensors), settings(call)
    alone = [[k == j for j in range(len(needed))] for k in range(len(stored))]
    pairs = zip(stored, alone, strict=True)
    return [g if g is None else scale(g, by, False, only, *slots, *own) for g, only in pairs]


def gradients(
    call: Any,
    tensors: Sequence[Slot],
    needed: Sequence[bool],
    stored: Sequence[Slot] | None,
    incoming: Sequence[Slot],
) -> list[Slot]:
    """By the first tensors: those that forward stored, scaled, or those of the operator for backward."""
    grads: Sequence[Slot]
    if stored is not None:
        arrived = incoming[0]
        assert arrived is not None
        if _rescales(call, stored):
            grads = _rescaled(call, tensors, needed, stored, arrived)
        else:
            grads = scaled(stored, arrived)
    else:
        here = [g is not None for g in incoming]
        given = [g for g in incoming if g is not None]
        backward = operator(f"{call.family}_backward")
        slots = arguments(call, tensors)
        each = iter(backward(given, here, list(needed), *slots, *settings(call)))
        grads = [next(each) if need else None for need in needed]
    pairs = zip(grads, tensors, strict=False)
    return [g if g is None or t is None else g.sum_to_size(t.shape).to(t.dtype) for g, t in pairs]


def scaled(stored: Sequence[Slot], incoming: Tensor) -> list[Slot]:
    """The stored gradients times the scalar that arrives, in a graph."""
    scale = operator("scaled")
    return [
        g if g is None else scale(g, incoming, False) if g.device.type == "cpu" else g * incoming
        for g in stored
    ]


def _scaled(gradient: Tensor, incoming: Tensor, given: bool) -> Tensor:
    """The product; in the gradient's own memory where that is `given`, as Inductor alone does, which knows."""
    if not given or torch_state.keeps_graph():
        return gradient * incoming
    if incoming.item() != 1.0:
        gradient.mul_(incoming)
    return gradient.detach()


def _fake_scaled(gradient: Tensor, incoming: Tensor, given: bool) -> Tensor:
    inductor.gives_away(operator("scaled"), multiplies=True)
    return torch.empty_like(gradient)


def _unless_triton_fails(
    call: Any, tensor: Tensor, kernel: Callable[[], T], formula: Callable[[], T]
) -> T:
    """As `dispatch` does, for a graph that was compiled with the operator in it."""
    if not (gpu.serves(tensor) and gpu.problem(call.family)):
        try:
            return kernel()
        except gpu.Failed as failed:
            gpu.turn_off(failed, call.family)
    return formula()


def _forward(
    call: Any, tensors: Sequence[Any], needed: Sequence[bool]
) -> tuple[Sequence[Tensor], Sequence[Slot]]:
    """The results, and the gradients that are needed of a reduced loss."""
    if isinstance(call, LinearCall):
        call.check(tensors)
        return run_chunks(call, tuple(tensors), needed)

    def by_kernel() -> tuple[Tensor, Sequence[Slot]]:
        wanted = needed if any(needed) else ()
        try:
            result, grads = engine_of(call, tensors[0]).forward(call, tensors, wanted)
        except OutsideDomain:
            call.refuse(tensors)
        return result, grads[: call.gradients]

    def by_formula() -> tuple[Tensor, Sequence[Slot]]:
        result = call.by_formula(*tensors)
        one = torch.ones_like(result)
        return result, _by_formula(call, tensors, needed, one) if any(needed) else ()

    result, grads = _unless_triton_fails(call, tensors[0], by_kernel, by_formula)
    return (result,), grads


def _backward(
    call: Any, tensors: Sequence[Any], needed: Sequence[bool], incoming: Sequence[Slot]
) -> Sequence[Slot]:
    if isinstance(call, LinearCall):
        return run_chunks(call, tuple(tensors), needed, incoming)[1]
    (arrived,) = incoming
    assert arrived is not None
    return _unless_triton_fails(
        call,
        tensors[0],
        lambda: engine_of(call, tensors[0]).backward(call, tensors, needed, arrived),
        lambda: _by_formula(call, tensors, needed, arrived),
    )


def _by_formula(
    call: Any, tensors: Sequence[Any], needed: Sequence[bool], incoming: Slot
) -> list[Slot]:
    with differentiating():
        needed = [*needed, *(False,) * (len(tensors) - len(needed))]
        pairs = zip(tensors, needed, strict=True)
        leaves = [t.detach().requires_grad_() if need else t for t, need in pairs]
        grads = redo(call, leaves, needed, [incoming])
    # Laid out as the graph that called expects it.
    found = zip(grads, tensors, strict=True)
    return [g if g is None else call.empty_gradient(t).copy_(g.detach()) for g, t in found]


def _present(call: Any, grads: Sequence[Slot], tensors: Sequence[Any]) -> list[Tensor]:
    """The gradients that there are, laid out as the fakes say: of what was broadcast a sum."""
    pairs = zip(grads, tensors, strict=False)
    return [
        g if g.shape == t.shape else call.empty_gradient(t).copy_(g.sum_to_size(t.shape))
        for g, t in pairs
        if g is not None
    ]


def _of(saved: Any, reads: bool) -> Slot:
    """A saved tensor, or where it is not read what it is now."""
    if type(saved) is not Changed:
        return saved
    if reads:
        raise saved.error
    return saved.now


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator, with its kernel for every device."""
    name, arguments = schema.split("(", 1)
    name = f"{name}.{OVERLOAD}"
    LIBRARY.define(f"{name}({arguments}")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"fusedloss::{name}", fake, lib=LIBRARY)


class Operator:
    """The operators of a kind of call."""

    def __init__(self, kind: type[Any], tensors: Sequence[str]) -> None:
        self.kind, self.count = kind, len(tensors)
        fields = dataclasses.fields(kind)
        others = ", ".join(f"{KINDS[str(field.type)]} {field.name}" for field in fields)
        given = ", ".join(tensors)
        name = kind.family
        define(f"{name}({given}, bool[] needed, {others}) -> Tensor[]", self.forward, self.fake)
        define(
            f"{name}_backward(Tensor[] incoming, bool[] arrived, bool[] needed, {given}, {others})"
            " -> Tensor[]",
            self.backward,
            self.fake_backward,
        )
        define(
            f"{name}_scaled(Tensor gradient, Tensor incoming, bool given, bool[] needed, {given}, {others})"
            " -> Tensor",
            self.scaled,
            self.fake_scaled,
        )
        torch.library.register_autograd(
            f"fusedloss::{name}.{OVERLOAD}",
            self.differentiate,
            setup_context=self.keep,
            lib=LIBRARY,
        )

    def call(self, settings: Sequence[Any]) -> Any:
        pairs = zip(settings, dataclasses.fields(self.kind), strict=True)
        return self.kind(**{f.name: _field(v, str(f.type)) for v, f in pairs})

    def own(self, call: Any, slots: Sequence[Any]) -> tuple[Any, ...]:
        """Of the arguments for tensors those of the call."""
        return (*slots[: len(call.arguments) - 1], slots[self.count - 1])

    def parts(self, given: Sequence[Any]) -> tuple[tuple[Any, ...], list[bool], Any]:
        call = self.call(given[self.count + 1 :])
        return self.own(call, given), given[self.count], call

    def forward(self, *given: Any) -> list[Tensor]:
        tensors, needed, call = self.parts(given)
        trace.by_kernel[call.loss] += 1
        results, grads = _forward(call, tensors, needed)
        return [*(t.contiguous() for t in results), *_present(call, grads, tensors)]

    def fake(self, *given: Any) -> list[Tensor]:
        tensors, needed, call = self.parts(given)
        shape = call.shape(*tensors) if call.reduction == "none" else ()
        results = [tensors[0].new_empty(shape, dtype=call.dtype) for _ in range(call.outputs)]
        return [*results, *self.empty_gradients(call, tensors, needed)]

    def empty_gradients(self, call: Any, tensors: Sequence[Any], needed: Any) -> list[Tensor]:
        if isinstance(call, LinearCall):
            return call.empty_gradients(tensors, needed)
        pairs = zip(tensors, needed, strict=False)
        return [call.empty_gradient(t) for t, need in pairs if need and t is not None]

    def backward(
        self, incoming: list[Tensor], arrived: list[bool], needed: list[bool], *given: Any
    ) -> list[Tensor]:
        call = self.call(given[self.count :])
        tensors, each = self.own(call, given), iter(incoming)
        arriving = [next(each) if here else None for here in arrived]
        return _present(call, _backward(call, tensors, needed, arriving), tensors)

    def fake_backward(
        self, incoming: list[Tensor], arrived: list[bool], needed: list[bool], *given: Any
    ) -> list[Tensor]:
        call = self.call(given[self.count :])
        return self.empty_gradients(call, self.own(call, given), needed)

    def scaled(
        self, gradient: Tensor, incoming: Tensor, kept: bool, needed: list[bool], *given: Any
    ) -> Tensor:
        if scales_exactly((gradient,), incoming):
            return _scaled(gradient, incoming, kept)
        return self.backward([incoming], [True], needed, *given)[0]

    def fake_scaled(self, gradient: Tensor, *_: Any) -> Tensor:
        inductor.gives_away(operator(f"{self.kind.family}_scaled"))
        return torch.empty_like(gradient)

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, ctx.stored, ctx.call = self.parts(inputs)
        # Detached: an output is unpacked by its node alone, and not where an input was changed.
        stored = (g.detach() for g in output[ctx.call.outputs :])
        ctx.save_for_backward(*tensors, *stored)
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, incoming: list[Slot]) -> tuple[Any, ...]:
        call, needed = ctx.call, self.own(ctx.call, ctx.needs_input_grad)
        saved = unpacked(ctx)  # a checkpoint gives them once
        create_graph, stores = torch.is_grad_enabled(), any(ctx.stored)
        reads = create_graph or not stores or _rescales(call, saved[len(needed) :])
        count = len(needed)
        tensors = tuple(_of(each, reads) for each in saved[:count])
        arriving = incoming[: call.outputs]
        grads: Sequence[Slot] = ()
        if any(g is not None for g in arriving):
            if create_graph:
                grads = arguments(call, redo(call, tensors, needed, arriving))
            else:
                each = iter(saved[count:])
                stored = [next(each) if s else None for s in ctx.stored] if stores else None
                grads = gradients(call, tensors, needed[: call.gradients], stored, arriving)
        lacking = (None,) * (self.count - len(grads))
        others = (ctx.stored, *settings(call))
        # torch takes an empty list for one of tensors.
        of_others: Iterator[Any] = (
            [] if isinstance(o, list | tuple) and not o else None for o in others
        )
        return (*grads, *lacking, *of_others)


define("scaled(Tensor gradient, Tensor incoming, bool given) -> Tensor", _scaled, _fake_scaled)
for _kind, _tensors in TENSORS.items():
    Operator(_kind, _tensors)
