"""The triplet margin loss on the CPU: packs the arguments of its kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kinds.triplet import TripletCall
from .. import abi
from .load import DTYPES, Run, address, run

PACK = abi.TRIPLET.packer()
POINTERS = abi.TRIPLET.pointers(
    ("input[0]", "input[1]", "input[2]"), "total", ("grad[0]", "grad[1]", "grad[2]"), "incoming"
)
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
        return abi.MATRIX.absent
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
    arguments = PACK(
        rows=rows,
        features=features,
        swap=call.swap,
        margin=call.margin,
        p=call.p,
        eps=call.eps,
        denominator=denominator,
        grad_scale=1.0 / denominator if denominator else float("nan"),
        input=[n for name, t in zip(NAMES, flat, strict=True) for n in _matrix(name, t, features)],
        incoming=_matrix("incoming", arrived, 1),
        loss=_matrix("losses", None if losses is None else losses.reshape(rows, 1), 1),
        total=_matrix("loss", None if total is None else total.reshape(1, 1), 1),
        grad=[
            n
            for g in grads
            for n in _matrix("gradient", None if g is None else g.reshape(rows, features), features)
        ],
    )
    run("triplet", call.loss, arguments, shape.numel())
