"""Pointwise losses on the CPU: packs the arguments of the one C++ loop."""

from __future__ import annotations

import math
import struct
from typing import Any, NoReturn

from ...core import errors
from ...core.layout import coalesced
from ...kinds.names import NUMBERS, OPERANDS
from ...kinds.pointwise import PointwiseCall
from ...kinds.torch_m import OutsideDomain
from .. import abi
from ..plan import PointwisePlan, Slots
from .engine import CpuEngine
from .load import DTYPES, address, formula_numbers

# As csrc/pointwise.h has them: the arrays with strides, and the names of all but for the operands'.
SLOTS = 2 * OPERANDS + 3
NAMES = ("weight", "incoming", "losses", "loss", *("gradient",) * OPERANDS)
DENSE = (1,) * SLOTS
ABSENT = [0, 0] * (SLOTS + 1)
LACKING = [(None,) * (OPERANDS - k) for k in range(OPERANDS + 1)]
ZEROS = [(0.0,) * (NUMBERS - k) for k in range(NUMBERS + 1)]
FIELDS = f"={3 + 2 * (SLOTS + 1)}q{2 + NUMBERS}d{{}}q"
PACK_DENSE = struct.Struct(FIELDS.format(1 + SLOTS)).pack


class PointwiseEngine(CpuEngine[PointwisePlan]):
    plan = PointwisePlan
    pointers = abi.POINTWISE.pointers(
        (*(f"operand[{k}]" for k in range(OPERANDS)), "multiplier[0]"),
        tuple(f"grad[{k}]" for k in range(OPERANDS)),
        "multiplier[1]",
    )
    divisors = (abi.POINTWISE.places["denominator"], abi.POINTWISE.places["grad_scale"])

    def places(self, call: Any) -> tuple[int, ...]:
        *operands, weight = self.pointers.inputs
        return (*operands[: len(call.formula.operands)], weight)

    def quotients(self, call: Any, tensors: Slots, numel: int) -> tuple[float, float]:
        denominator = 1.0
        if call.reduction == "mean":
            divisor = call.divisor(tensors)
            denominator = float(numel if divisor is None else divisor)
        return denominator, 1.0 / denominator if denominator else math.nan

    def pack(self, plan: PointwisePlan) -> tuple[str, str, bytes, int]:
        call, tensors, total, shape = plan.call, plan.tensors, plan.total, plan.shape
        *operands, weight = tensors
        lacking = LACKING[len(operands)]
        everything = (*operands, *lacking, weight, plan.incoming, plan.losses, total, *plan.grads)
        arrays, at = ABSENT.copy(), 0
        for t in everything:
            if t is not None:
                place = t.data_ptr()
                arrays[at] = place or address(call.formula.name, _name(call, at // 2), t)
                arrays[at + 1] = DTYPES[t.dtype]
            at += 2
        numel = shape.numel()
        head = (_number(call), numel)
        quotients = self.quotients(call, tensors, numel)
        numbers = (*quotients, *call.params, *ZEROS[len(call.params)])
        if plan.dense:
            arguments = PACK_DENSE(*head, 1, *arrays, *numbers, numel, *DENSE)
        else:
            slots = (*everything[: OPERANDS + 3], *plan.grads)
            slots += (None,) * (SLOTS - len(slots))
            sizes, kept = coalesced(
                shape, [t.expand(shape).stride() for t in slots if t is not None]
            )
            if not sizes:
                sizes, kept = [1], [[1] for _ in kept]
            present, nowhere = iter(kept), [0] * len(sizes)
            strides = [n for t in slots for n in (nowhere if t is None else next(present))]
            fields = FIELDS.format(len(sizes) + len(strides))
            arguments = struct.pack(fields, *head, len(sizes), *arrays, *numbers, *sizes, *strides)
        return "pointwise", call.formula.name, arguments, numel

    def refuse(self, plan: PointwisePlan, position: int) -> NoReturn:
        raise OutsideDomain


def _name(call: PointwiseCall, slot: int) -> str:
    """What a message calls the tensor in a slot."""
    return call.arguments[slot] if slot < OPERANDS else NAMES[slot - OPERANDS]


def _number(call: PointwiseCall) -> int:
    """Of the formula's kernel in the library."""
    found = formula_numbers().get(call.formula.name)
    if found is None:
        words = "the CPU kernels were built without this formula: build them anew"
        errors.fail(RuntimeError, call.formula.name, words)
    return found
