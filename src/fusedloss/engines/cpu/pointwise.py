"""Pointwise losses on the CPU: packs the arguments of the one C++ loop."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.layout import coalesced
from ...kinds.pointwise import PointwiseCall
from ...kinds.torch_m import OutsideDomain
from .. import abi
from .load import DTYPES, Run, address, formula_numbers, run

SLOTS = 8  # the arrays that have strides: three inputs, two multipliers, losses, two gradients
NAMES = ("input", "target", "pos_weight", "weight", "incoming", "losses", "gradient", "gradient")
DENSE = (1,) * SLOTS
ABSENT = (0, 0)
FIELDS = "=21q4d{}q"
POINTERS = abi.POINTWISE.pointers(
    ("input[0]", "input[1]"), "total", ("grad[0]", "grad[1]"), "multiplier[1]"
)
PACK_DENSE = struct.Struct(FIELDS.format(1 + SLOTS)).pack

Slot = Tensor | None


def forward(
    call: PointwiseCall, tensors: tuple[Slot, ...], needed: Sequence[bool], run: Run = run
) -> tuple[Tensor, list[Slot]]:
    """The result, and the gradients that are needed, in the shape that the operands broadcast to."""
    first = tensors[0]
    assert first is not None
    shape, dense = _common(first, tensors)
    grads = _gradients(tensors, needed, shape)
    if call.reduction == "none":
        result = _empty_like(first, shape, call.dtype)
        _launch(call, tensors, None, result, None, grads, shape, dense, run)
    else:
        result = first.new_empty((), dtype=call.dtype)
        _launch(call, tensors, None, None, result, grads, shape, dense, run)
    return result, grads


def backward(
    call: PointwiseCall,
    tensors: tuple[Slot, ...],
    needed: Sequence[bool],
    incoming: Tensor,
    run: Run = run,
) -> list[Slot]:
    first = tensors[0]
    assert first is not None
    shape, dense = _common(first, tensors)
    if dense and call.reduction == "none":
        dense = incoming.is_contiguous()
    else:
        incoming, dense = incoming.expand(shape), False
    grads = _gradients(tensors, needed, shape)
    _launch(call, tensors, incoming, None, None, grads, shape, dense, run)
    return grads


def _common(first: Tensor, tensors: Sequence[Slot]) -> tuple[torch.Size, bool]:
    """The shape that the tensors broadcast to, and whether each has it and is contiguous."""
    shape, dense = first.shape, first.is_contiguous()
    for t in tensors[1:]:
        if t is None:
            continue
        if t.shape != shape:
            return torch.broadcast_shapes(*(t.shape for t in tensors if t is not None)), False
        dense = dense and t.is_contiguous()
    return shape, dense


def _empty_like(operand: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if operand.shape == shape:
        return torch.empty_like(operand, dtype=dtype)
    return operand.new_empty(shape, dtype=dtype)


def _gradients(tensors: Sequence[Slot], needed: Sequence[bool], shape: torch.Size) -> list[Slot]:
    grads: list[Slot] = [None, None]
    for k, need in enumerate(needed[:2]):
        tensor = tensors[k]
        if need and tensor is not None:
            grads[k] = _empty_like(tensor, shape, tensor.dtype)
    return grads


def _launch(
    call: PointwiseCall,
    tensors: Sequence[Slot],
    incoming: Slot,
    losses: Slot,
    total: Slot,
    grads: Sequence[Slot],
    shape: torch.Size,
    dense: bool,
    run: Run,
) -> None:
    third = tensors[2] if len(tensors) > 3 else None
    slots = (*tensors[:2], third, tensors[-1], incoming, losses, *grads)
    numel = shape.numel()
    arrays: list[int] = []
    for name, t in zip(NAMES, slots, strict=True):
        place = ABSENT if t is None else (address(call.formula.name, name, t), DTYPES[t.dtype])
        arrays += place
    arrays[12:12] = ABSENT if total is None else (total.data_ptr(), DTYPES[total.dtype])
    denominator = 1.0
    if call.reduction == "mean":
        denominator = float(numel if call.denominator is None else call.denominator)
    head = (formula_numbers()[call.formula.name], numel)
    scale = 1.0 / denominator if denominator else math.nan
    numbers = (denominator, scale, *(*call.params, 0.0, 0.0)[:2])
    if dense:
        arguments = PACK_DENSE(*head, 1, *arrays, *numbers, numel, *DENSE)
    else:
        sizes, kept = coalesced(shape, [t.expand(shape).stride() for t in slots if t is not None])
        if not sizes:
            sizes, kept = [1], [[1] for _ in kept]
        present, absent = iter(kept), [0] * len(sizes)
        strides = [n for t in slots for n in (absent if t is None else next(present))]
        fields = FIELDS.format(len(sizes) + len(strides))
        arguments = struct.pack(fields, *head, len(sizes), *arrays, *numbers, *sizes, *strides)
    if run("pointwise", call.formula.name, arguments, numel) >= 0:
        raise OutsideDomain
