"""Pointwise losses on the CPU: packs the arguments of the one C++ loop."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls import PointwiseCall
from ..formula import OutsideDomain
from .load import DTYPES, formula_numbers, library

SLOTS = 8  # the arrays that have strides: three inputs, two multipliers, losses, two gradients
DENSE = (1,) * SLOTS
ABSENT = (0, 0)

Slot = Tensor | None


def forward(
    call: PointwiseCall, tensors: tuple[Slot, ...], needed: Sequence[bool]
) -> tuple[Tensor, list[Slot]]:
    """The result, and the gradients that are needed, in the shape that the operands broadcast to."""
    *operands, weight = tensors
    shape = _broadcast(operands)
    grads = _gradients(operands, needed, shape)
    if call.reduction == "none":
        result = _empty_like(operands[0], shape, call.dtype)
        _launch(call, operands, weight, None, result, None, grads, shape)
    else:
        result = torch.empty((), dtype=call.dtype)
        _launch(call, operands, weight, None, None, result, grads, shape)
    return result, grads


def backward(
    call: PointwiseCall, tensors: tuple[Slot, ...], needed: Sequence[bool], incoming: Tensor
) -> list[Slot]:
    *operands, weight = tensors
    shape = _broadcast(operands)
    grads = _gradients(operands, needed, shape)
    _launch(call, operands, weight, incoming, None, None, grads, shape)
    return grads


def _broadcast(operands: Sequence[Slot]) -> torch.Size:
    shapes = [o.shape for o in operands if o is not None]
    for shape in shapes:
        if shape != shapes[0]:
            return torch.broadcast_shapes(*shapes)
    return shapes[0]


def _empty_like(operand: Slot, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    assert operand is not None
    if operand.shape == shape:
        return torch.empty_like(operand, dtype=dtype, requires_grad=False)
    return operand.new_empty(shape, dtype=dtype)


def _gradients(operands: Sequence[Slot], needed: Sequence[bool], shape: torch.Size) -> list[Slot]:
    if not needed:
        return [None, None]
    pairs = zip(operands[:2], needed, strict=False)
    return [_empty_like(o, shape) if need else None for o, need in pairs]


def _coalesce(
    shape: torch.Size, strides: Sequence[Sequence[int] | None]
) -> tuple[list[int], list[int]]:
    """As few dimensions as serve all arrays, in the order of the first one's memory."""
    rows = [s for s in strides if s is not None]
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in rows]
    for d in sorted(range(len(shape)), key=lambda d: -rows[0][d]):
        if shape[d] == 1:
            continue
        outer = zip(merged, rows, strict=True)
        if sizes and all(m[-1] == row[d] * shape[d] for m, row in outer):
            sizes[-1] *= shape[d]
            for m, row in zip(merged, rows, strict=True):
                m[-1] = row[d]
        else:
            sizes.append(shape[d])
            for m, row in zip(merged, rows, strict=True):
                m.append(row[d])
    if not sizes:
        sizes, merged = [1], [[1] for _ in rows]
    present = iter(merged)
    absent = [0] * len(sizes)
    return sizes, [n for s in strides for n in (absent if s is None else next(present))]


def _launch(
    call: PointwiseCall,
    operands: Sequence[Slot],
    weight: Slot,
    incoming: Slot,
    losses: Slot,
    total: Slot,
    grads: Sequence[Slot],
    shape: torch.Size,
) -> None:
    inputs = (*operands, None) if len(operands) == 2 else operands
    slots = (*inputs, weight, incoming, losses, *grads)
    numel = shape.numel()
    sizes: Sequence[int]
    strides: Sequence[int]
    arrays: list[int] = []
    dense = True
    for t in slots:
        if t is None:
            arrays += ABSENT
        else:
            arrays += t.data_ptr(), DTYPES[t.dtype]
            dense = dense and t.is_contiguous() and t.shape == shape
    arrays[12:12] = ABSENT if total is None else (total.data_ptr(), DTYPES[total.dtype])
    if dense:
        sizes, strides = (numel,), DENSE
    else:
        spread = [None if t is None else t.expand(shape).stride() for t in slots]
        sizes, strides = _coalesce(shape, spread)
    denominator = 1.0
    if call.reduction == "mean":
        denominator = float(numel if call.denominator is None else call.denominator)
    arguments = struct.pack(
        f"=21q4d{len(sizes) + len(strides)}q",
        formula_numbers()[call.formula.name],
        numel,
        len(sizes),
        *arrays,
        denominator,
        1.0 / denominator if denominator else float("nan"),
        *(*call.params, 0.0, 0.0)[:2],
        *sizes,
        *strides,
    )
    if library().fusedloss_pointwise(arguments) >= 0:
        raise OutsideDomain
