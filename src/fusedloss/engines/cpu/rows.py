"""Cross entropy and negative log likelihood on the CPU: packs the arguments of the row kernels."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from ...core import errors
from .. import abi
from ..plan import RowsPlan, class_strides, flat, value_strides
from .engine import CpuEngine
from .load import array

PACK = abi.ROWS.packer()
ABSENT = abi.GRID.absent


class RowsEngine(CpuEngine[RowsPlan]):
    plan = RowsPlan
    pointers = abi.ROWS.pointers(("input", "target", "weight"), ("grad", "grad_target"))
    divisors = (abi.ROWS.places["denominator"],)

    def pack(self, plan: RowsPlan) -> tuple[str, str, bytes, int]:
        call, target = plan.call, plan.target
        loss, losses = call.loss, plan.losses
        grad, of_target = plan.grads
        n, c, d = plan.sizes()
        arguments = PACK(
            n=n,
            c=c,
            d=d,
            probabilities=call.probabilities,
            mean=call.reduction == "mean",
            denominator=call.denominator or 0.0,
            ignore_index=call.ignore_index,
            smoothing=call.smoothing,
            gamma=call.gamma,
            input=_classes(loss, "input", plan.x),
            target=(_classes if call.probabilities else _values)(loss, "target", target),
            weight=ABSENT if plan.weight is None else _values(loss, "weight", plan.weight),
            incoming=ABSENT if plan.incoming is None else _values(loss, "incoming", plan.incoming),
            loss=ABSENT if losses is None else _values(loss, "losses", flat(losses, 1)),
            total=ABSENT if plan.total is None else _values(loss, "loss", plan.total),
            grad=ABSENT if grad is None else _classes(loss, "gradient", flat(grad, 2)),
            grad_target=ABSENT
            if of_target is None
            else _classes(loss, "gradient", flat(of_target, 2)),
        )
        kernel = "cross_entropy" if call.softmax else loss
        return kernel, loss, arguments, plan.x.numel()

    def refuse(self, plan: RowsPlan, position: int) -> NoReturn:
        target, call = plan.tensors[1], plan.call
        assert target is not None
        errors.out_of_range(call.loss, target, position, plan.sizes()[1], call.ignore_index)


def _classes(loss: str, name: str, tensor: Tensor) -> tuple[int, ...]:
    """Pointer, dtype and (n, c, d) strides of a tensor with a class dimension."""
    return (*array(loss, name, tensor), *class_strides(tensor))


def _values(loss: str, name: str, tensor: Tensor) -> tuple[int, ...]:
    """The same of a tensor with one value a row, or one for all."""
    return (*array(loss, name, tensor), *value_strides(tensor))
