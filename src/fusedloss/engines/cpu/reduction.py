"""Losses of rows on the CPU: packs the arguments of their kernel."""

from __future__ import annotations

from ...kinds.reduction import NUMBERS, OPERANDS
from .. import abi
from ..plan import ReductionPlan
from .engine import CpuEngine
from .load import matrix, reduction_numbers

PACK = abi.REDUCTION.packer()
ABSENT = abi.MATRIX.absent * OPERANDS


class ReductionEngine(CpuEngine[ReductionPlan]):
    plan = ReductionPlan
    pointers = abi.REDUCTION.pointers(
        ("input[0]", "input[1]", "input[2]"), ("grad[0]", "grad[1]", "grad[2]")
    )
    divisors = (abi.REDUCTION.places["denominator"], abi.REDUCTION.places["grad_scale"])

    def pack(self, plan: ReductionPlan) -> tuple[str, str, bytes, int]:
        call, rows, features = plan.call, plan.rows, plan.features
        loss, denominator = call.loss, call.over(rows)

        given = zip(call.arguments, plan.flat, strict=False)
        inputs = [n for name, t in given for n in matrix(loss, name, t, rows, features)]
        grads = [n for g in plan.grads for n in matrix(loss, "gradient", g, rows, features)]
        arguments = PACK(
            definition=reduction_numbers()[call.definition],
            rows=rows,
            features=features,
            denominator=denominator,
            grad_scale=1.0 / denominator if denominator else float("nan"),
            numbers=(*call.numbers, *(0.0,) * NUMBERS)[:NUMBERS],
            input=(*inputs, *ABSENT)[: len(ABSENT)],
            incoming=matrix(loss, "incoming", plan.incoming, rows, 1),
            loss=matrix(loss, "losses", plan.losses, rows, 1),
            total=matrix(loss, "loss", plan.total, 1, 1),
            grad=(*grads, *ABSENT)[: len(ABSENT)],
        )
        return "reduction", loss, arguments, plan.shape.numel()
