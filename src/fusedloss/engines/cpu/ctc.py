"""Connectionist temporal classification on the CPU: packs the arguments of its kernel."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ...kinds.ctc import refuse_label
from .. import abi
from ..plan import CtcPlan, Slot
from .engine import CpuEngine
from .load import array

PACK = abi.CTC.packer()


class CtcEngine(CpuEngine[CtcPlan]):
    plan = CtcPlan

    def pack(self, plan: CtcPlan) -> tuple[str, str, bytes, int]:
        call, x, incoming = plan.call, plan.x, plan.incoming
        (grad,) = plan.grads
        frames, n, classes = x.shape
        arguments = PACK(
            t=frames,
            n=n,
            c=classes,
            most=plan.most,
            blank=call.blank,
            zero_infinity=call.zero_infinity,
            mean=call.reduction == "mean",
            denominator=call.over(n),
            lengths=plan.lengths.data_ptr(),
            target=_array("targets", plan.targets),
            label_stride=plan.label_stride,
            input=_grid("log_probs", x),
            incoming=_array("incoming", incoming),
            incoming_stride=0 if incoming is None else sum(incoming.stride()),
            loss=_array("losses", plan.losses),
            total=_array("loss", plan.total),
            grad=abi.GRID.absent if grad is None else _grid("gradient", plan.batch(grad)),
        )
        return call.name, call.loss, arguments, x.numel()

    def refuse(self, plan: CtcPlan, position: int) -> NoReturn:
        n, place = divmod(position, plan.most)
        at = int(plan.lengths[3, n]) + place
        value = int(plan.targets.to(torch.int64).flatten()[at])
        refuse_label(plan.targets.shape, at, value, plan.x.shape[2])


def _array(name: str, tensor: Slot) -> tuple[int, ...]:
    return abi.ARRAY.absent if tensor is None else array("ctc_loss", name, tensor)


def _grid(name: str, tensor: Tensor) -> tuple[int, ...]:
    return (*_array(name, tensor), *tensor.stride())
