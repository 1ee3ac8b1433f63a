"""Losses of margins on the CPU: packs the arguments of their kernel."""

from __future__ import annotations

from typing import NoReturn

from ...core import errors
from .. import abi
from ..plan import MarginPlan
from .engine import CpuEngine
from .load import array, matrix

PACK = abi.MARGINS.packer()


class MarginEngine(CpuEngine[MarginPlan]):
    plan = MarginPlan
    pointers = abi.MARGINS.pointers(("input", "target", "weight"), ("grad",))
    divisors = (abi.MARGINS.places["denominator"], abi.MARGINS.places["grad_scale"])

    def pack(self, plan: MarginPlan) -> tuple[str, str, bytes, int]:
        call, loss, x, weight = plan.call, plan.call.loss, plan.x, plan.weight
        (rows, classes), labels = x.shape, plan.target.shape[1]
        denominator = call.over(rows)

        arguments = PACK(
            rows=rows,
            classes=classes,
            labels=labels,
            sets=call.sets,
            squared=call.squared,
            margin=call.margin,
            denominator=denominator,
            grad_scale=1.0 / denominator if denominator else float("nan"),
            input=matrix(loss, "input", x, rows, classes),
            target=matrix(loss, "target", plan.target, rows, labels),
            weight=abi.ARRAY.absent if weight is None else array(loss, "weight", weight),
            incoming=matrix(loss, "incoming", plan.incoming, rows, 1),
            loss=matrix(loss, "losses", plan.losses, rows, 1),
            total=matrix(loss, "loss", plan.total, 1, 1),
            grad=matrix(loss, "gradient", plan.grads[0], rows, classes),
        )
        return "margins", loss, arguments, x.numel()

    def refuse(self, plan: MarginPlan, position: int) -> NoReturn:
        target, call = plan.tensors[1], plan.call
        assert target is not None
        errors.label_out_of_range(call.loss, target, position, plan.x.shape[1], call.sets)
