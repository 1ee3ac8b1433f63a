"""Pointwise losses on the CPU: packs the arguments of the one C++ loop."""

from __future__ import annotations

import math
import struct
from typing import NoReturn

from ...core.layout import coalesced
from ...kinds.torch_m import OutsideDomain
from .. import abi
from ..plan import PointwisePlan
from .engine import CpuEngine
from .load import DTYPES, address, formula_numbers

SLOTS = 8  # the arrays that have strides: three inputs, two multipliers, losses, two gradients
NAMES = ("input", "target", "pos_weight", "weight", "incoming", "losses", "gradient", "gradient")
DENSE = (1,) * SLOTS
ABSENT = (0, 0)
FIELDS = "=21q4d{}q"
PACK_DENSE = struct.Struct(FIELDS.format(1 + SLOTS)).pack


class PointwiseEngine(CpuEngine[PointwisePlan]):
    plan = PointwisePlan
    pointers = abi.POINTWISE.pointers(
        ("input[0]", "input[1]"), "total", ("grad[0]", "grad[1]"), "multiplier[1]"
    )

    def pack(self, plan: PointwisePlan) -> tuple[str, str, bytes, int]:
        call, tensors, total, shape = plan.call, plan.tensors, plan.total, plan.shape
        third = tensors[2] if len(tensors) > 3 else None
        slots = (*tensors[:2], third, tensors[-1], plan.incoming, plan.losses, *plan.grads)
        numel = shape.numel()
        arrays: list[int] = []
        for name, t in zip(NAMES, slots, strict=True):
            if t is None:
                arrays += ABSENT
            else:
                arrays += t.data_ptr() or address(call.formula.name, name, t), DTYPES[t.dtype]
        arrays[12:12] = ABSENT if total is None else (total.data_ptr(), DTYPES[total.dtype])
        denominator = 1.0
        if call.reduction == "mean":
            denominator = float(numel if call.denominator is None else call.denominator)
        head = (formula_numbers()[call.formula.name], numel)
        scale = 1.0 / denominator if denominator else math.nan
        numbers = (denominator, scale, *(*call.params, 0.0, 0.0)[:2])
        if plan.dense:
            arguments = PACK_DENSE(*head, 1, *arrays, *numbers, numel, *DENSE)
        else:
            sizes, kept = coalesced(
                shape, [t.expand(shape).stride() for t in slots if t is not None]
            )
            if not sizes:
                sizes, kept = [1], [[1] for _ in kept]
            present, absent = iter(kept), [0] * len(sizes)
            strides = [n for t in slots for n in (absent if t is None else next(present))]
            fields = FIELDS.format(len(sizes) + len(strides))
            arguments = struct.pack(fields, *head, len(sizes), *arrays, *numbers, *sizes, *strides)
        return "pointwise", call.formula.name, arguments, numel

    def refuse(self, plan: PointwisePlan, position: int) -> NoReturn:
        raise OutsideDomain
