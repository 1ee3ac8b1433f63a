"""The triplet margin loss on the CPU: packs the arguments of its kernel."""

from __future__ import annotations

from ...kinds.triplet import TripletCall
from .. import abi
from ..plan import Slot, TripletPlan
from .engine import CpuEngine
from .load import DTYPES, address

PACK = abi.TRIPLET.packer()
NAMES = ("anchor", "positive", "negative")


class TripletEngine(CpuEngine[TripletPlan]):
    plan = TripletPlan
    pointers = abi.TRIPLET.pointers(
        ("input[0]", "input[1]", "input[2]"), "total", ("grad[0]", "grad[1]", "grad[2]"), "incoming"
    )

    def pack(self, plan: TripletPlan) -> tuple[str, str, bytes, int]:
        call, rows, features = plan.call, plan.rows, plan.features
        denominator = float(rows) if call.reduction == "mean" else 1.0
        arguments = PACK(
            rows=rows,
            features=features,
            swap=call.swap,
            margin=call.margin,
            p=call.p,
            eps=call.eps,
            denominator=denominator,
            grad_scale=1.0 / denominator if denominator else float("nan"),
            input=[
                n
                for name, t in zip(NAMES, plan.flat, strict=True)
                for n in _matrix(name, t, rows, features)
            ],
            incoming=_matrix("incoming", plan.incoming, rows, 1),
            loss=_matrix("losses", plan.losses, rows, 1),
            total=_matrix("loss", plan.total, 1, 1),
            grad=[n for g in plan.grads for n in _matrix("gradient", g, rows, features)],
        )
        return "triplet", call.loss, arguments, plan.shape.numel()


def _matrix(name: str, tensor: Slot, rows: int, features: int) -> tuple[int, ...]:
    """Pointer, dtype and strides of the tensor as rows of features."""
    if tensor is None:
        return abi.MATRIX.absent
    if tensor.dim() != 2:
        tensor = tensor.reshape(rows, features)
    at = tensor.data_ptr() or address(TripletCall.loss, name, tensor)
    return at, DTYPES[tensor.dtype], *tensor.stride()
