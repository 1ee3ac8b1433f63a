"""Losses of margins on the CPU: packs the arguments of their kernel."""

from __future__ import annotations

from typing import NoReturn

from ...core import errors
from .. import abi
from ..plan import MarginPlan, Slot
from .engine import CpuEngine
from .load import DTYPES, address

PACK = abi.MARGINS.packer()


class MarginEngine(CpuEngine[MarginPlan]):
    plan = MarginPlan
    pointers = abi.MARGINS.pointers(("input", "target"), "total", ("grad",), "incoming")

    def pack(self, plan: MarginPlan) -> tuple[str, str, bytes, int]:
        call, x, weight = plan.call, plan.x, plan.weight
        rows, classes = x.shape
        denominator = float(rows) if call.reduction == "mean" else 1.0

        def matrix(name: str, tensor: Slot, rows: int = rows) -> tuple[int, ...]:
            """Pointer, dtype and strides of the tensor as so many rows."""
            if tensor is None:
                return abi.MATRIX.absent
            if tensor.dim() != 2:
                tensor = tensor.reshape(rows, -1 if rows else 1)
            at = tensor.data_ptr() or address(call.loss, name, tensor)
            return at, DTYPES[tensor.dtype], *tensor.stride()

        arguments = PACK(
            rows=rows,
            classes=classes,
            labels=plan.target.shape[1],
            sets=call.sets,
            squared=call.squared,
            margin=call.margin,
            denominator=denominator,
            grad_scale=1.0 / denominator if denominator else float("nan"),
            input=matrix("input", x),
            target=matrix("target", plan.target),
            weight=abi.ARRAY.absent
            if weight is None
            else (weight.data_ptr() or address(call.loss, "weight", weight), DTYPES[weight.dtype]),
            incoming=matrix("incoming", plan.incoming),
            loss=matrix("losses", plan.losses),
            total=matrix("loss", plan.total, 1),
            grad=matrix("gradient", plan.grads[0]),
        )
        return "margins", call.loss, arguments, x.numel()

    def refuse(self, plan: MarginPlan, position: int) -> NoReturn:
        target, call = plan.tensors[1], plan.call
        assert target is not None
        errors.label_out_of_range(call.loss, target, position, plan.x.shape[1], call.sets)
