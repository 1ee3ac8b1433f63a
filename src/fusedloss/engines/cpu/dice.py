"""Losses of overlaps on the CPU: packs the arguments of their kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ...core import errors
from ...kinds.dice import ACTIVATIONS, WEIGHTINGS
from .. import abi
from ..plan import DicePlan, class_strides, value_strides
from .engine import CpuEngine
from .load import array

PACK = abi.DICE.packer()
ABSENT = abi.GRID.absent


class DiceEngine(CpuEngine[DicePlan]):
    plan = DicePlan
    pointers = abi.DICE.pointers(("input", "target", "weight"), ("grad",))

    def pack(self, plan: DicePlan) -> tuple[str, str, bytes, int]:
        call, x, target = plan.call, plan.x, plan.target
        (grad,) = plan.grads
        n, c, d = x.shape
        many = call.weighting == "none"

        def entries(name: str, tensor: Tensor | None) -> tuple[int, ...]:
            """One for each image and class, for each of one of these, or one for all."""
            if tensor is None:
                return ABSENT
            strides = tensor.stride()
            both = (0, *strides) if many and len(strides) < 2 else (*strides, 0)
            return _grid(call.loss, name, tensor, (*both[:2], 0) if strides else (0, 0, 0))

        arguments = PACK(
            n=n,
            c=c,
            d=d,
            activation=ACTIVATIONS.index(call.activation),
            masks=call.masks,
            batch=call.batch,
            first=int(not call.background),
            weighting=WEIGHTINGS.index(call.weighting),
            skip_absent=call.skip_absent,
            mean=call.reduction == "mean" and call.denominator is None,
            threads=torch.get_num_threads(),
            ignore_index=call.ignore_index,
            alpha=call.alpha,
            beta=call.beta,
            smooth_nr=call.smooth_nr,
            smooth_dr=call.smooth_dr,
            by_overlap=call.by_overlap / (call.denominator or 1.0),
            by_rows=call.by_rows,
            gamma=call.gamma,
            input=_grid(call.loss, "input", x, class_strides(x)),
            target=_grid(
                *(call.loss, "target", target),
                class_strides(target) if call.masks else value_strides(target),
            ),
            weight=ABSENT
            if plan.weight is None
            else _grid(call.loss, "weight", plan.weight, value_strides(plan.weight)),
            incoming=entries("incoming", plan.incoming),
            loss=entries("losses", plan.losses),
            total=entries("loss", plan.total),
            grad=ABSENT
            if grad is None
            else _grid(call.loss, "gradient", grad, class_strides(plan.of_images(grad))),
        )
        return "dice", call.loss, arguments, x.numel()

    def refuse(self, plan: DicePlan, position: int) -> NoReturn:
        target, call = plan.tensors[1], plan.call
        assert target is not None
        errors.out_of_range(call.loss, target, position, plan.x.shape[1], call.ignore_index)


def _grid(loss: str, name: str, tensor: Tensor, strides: Sequence[int]) -> tuple[int, ...]:
    """Pointer, dtype and strides (n, c, d)."""
    if tensor.dtype is torch.bool:
        tensor = tensor.view(torch.uint8)
    return (*array(loss, name, tensor), *strides)
