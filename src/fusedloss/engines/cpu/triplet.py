"""The triplet margin loss on the CPU: packs the arguments of its kernel."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kinds.triplet import TripletCall
from .load import DTYPES, Pointers, Run, address, run

FIELDS = "=3q5d36q"
# Where these hold the pointers of the inputs, of the reduced loss, of the gradients and of what arrives.
POINTERS = Pointers((8, 12, 16), 28, (32, 36, 40), 20)
NAMES = ("anchor", "positive", "negative")

Slot = Tensor | None


def forward(
    call: TripletCall, tensors: tuple[Slot, ...], needed: Sequence[bool], run: Run = run
) -> tuple[Tensor, list[Slot]]:
    inputs, shape = _expand(tensors)
    grads = _gradients(inputs, needed, shape)
    unreduced = call.reduction == "none"
    result = inputs[0].new_empty(shape[:-1] if unreduced else (), dtype=call.dtype)
    losses, total = (result, None) if unreduced else (None, result)
    _launch(call, inputs, None, losses, total, grads, shape, run)
    return result, grads


def backward(
    call: TripletCall,
    tensors: tuple[Slot, ...],
    needed: Sequence[bool],
    incoming: Tensor,
    run: Run = run,
) -> list[Slot]:
    inputs, shape = _expand(tensors)
    grads = _gradients(inputs, needed, shape)
    _launch(call, inputs, incoming, None, None, grads, shape, run)
    return grads


def _expand(tensors: Sequence[Slot]) -> tuple[list[Tensor], torch.Size]:
    inputs = [t for t in tensors if t is not None]
    shape = inputs[0].shape
    if not all(t.shape == shape for t in inputs):
        shape = torch.broadcast_shapes(*(t.shape for t in inputs))
        inputs = [t.expand(shape) for t in inputs]
    return inputs, shape


def _gradients(inputs: Sequence[Tensor], needed: Sequence[bool], shape: torch.Size) -> list[Slot]:
    grads: list[Slot] = [
        t.new_empty(shape) if need else None for t, need in zip(inputs, needed, strict=False)
    ]
    return grads or [None, None, None]


def _matrix(name: str, tensor: Slot, features: int) -> tuple[int, ...]:
    """Pointer, dtype and strides of the tensor as rows of features."""
    if tensor is None:
        return 0, 0, 0, 0
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, features)
    return address(TripletCall.loss, name, rows), DTYPES[rows.dtype], *rows.stride()


def _launch(
    call: TripletCall,
    inputs: Sequence[Tensor],
    incoming: Slot,
    losses: Slot,
    total: Slot,
    grads: Sequence[Slot],
    shape: torch.Size,
    run: Run,
) -> None:
    features, rows = shape[-1], shape[:-1].numel()
    # A view where it can be; the copies must outlive the call.
    flat = [t.reshape(rows, features) for t in inputs]
    arrived = None if incoming is None else incoming.expand(shape[:-1]).reshape(rows, 1)
    denominator = float(rows) if call.reduction == "mean" else 1.0
    arguments = struct.pack(
        FIELDS,
        rows,
        features,
        call.swap,
        call.margin,
        call.p,
        call.eps,
        denominator,
        1.0 / denominator if denominator else float("nan"),
        *(n for name, t in zip(NAMES, flat, strict=True) for n in _matrix(name, t, features)),
        *_matrix("incoming", arrived, 1),
        *_matrix("losses", None if losses is None else losses.reshape(rows, 1), 1),
        *_matrix("loss", None if total is None else total.reshape(1, 1), 1),
        *(
            n
            for g in grads
            for n in _matrix("gradient", None if g is None else g.reshape(rows, features), features)
        ),
    )
    run("fusedloss_triplet", call.loss, arguments, shape.numel())
