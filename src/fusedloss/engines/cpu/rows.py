"""Cross entropy and negative log likelihood on the CPU: packs the arguments of the row kernels.

A tensor is handed over as (n, c, d): an input of shape (N, C) as (1, C, N), so that positions have one
stride, and (N, C, d1, ...) as (N, C, d1 * ...).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...core import errors, reduce
from ...core.layout import empty_of_rows
from ...kinds.rows import RowsCall
from .. import abi
from .load import DTYPES, Run, address, run

Slot = Tensor | None
PACK = abi.ROWS.packer()
POINTERS = abi.ROWS.pointers(("input", "target"), "total", ("grad", "grad_target"), "incoming")
ABSENT = abi.GRID.absent


def forward(
    call: RowsCall, tensors: tuple[Slot, ...], needed: Sequence[bool], run: Run = run
) -> tuple[Tensor, list[Slot]]:
    input, target, weight = tensors
    assert input is not None and target is not None
    grads = _gradients(input, target, needed)
    if call.reduction == "none":
        result = input.new_empty(call.shape(input, target), dtype=call.dtype)
        _launch(call, input, target, weight, None, result, None, grads, run)
    else:
        result = input.new_empty((), dtype=call.dtype)
        _launch(call, input, target, weight, None, None, result, grads, run)
    return result, grads


def backward(
    call: RowsCall,
    tensors: tuple[Slot, ...],
    needed: Sequence[bool],
    incoming: Tensor,
    run: Run = run,
) -> list[Slot]:
    input, target, weight = tensors
    assert input is not None and target is not None
    grads = _gradients(input, target, needed)
    _launch(call, input, target, weight, incoming, None, None, grads, run)
    return grads


def _gradients(input: Tensor, target: Tensor, needed: Sequence[bool]) -> list[Slot]:
    """Memory for those that are needed."""
    grads: list[Slot] = [None, None]
    for k, need in enumerate(needed[:2]):
        if need:
            grads[k] = empty_of_rows(target if k else input)
    return grads


def _flat(tensor: Tensor, first: int) -> Tensor:
    """Dimensions from `first` on as one: a view where it can be, else a copy."""
    return tensor.flatten(first) if tensor.dim() > first + 1 else tensor


def _classes(loss: str, name: str, tensor: Slot) -> tuple[int, ...]:
    """Pointer, dtype and (n, c, d) strides of a tensor with a class dimension."""
    if tensor is None:
        return ABSENT
    tensor = _flat(tensor, 2)
    s = tensor.stride()
    strides = (0, s[1], s[0]) if len(s) == 2 else s if len(s) == 3 else (0, *s, 0)
    return address(loss, name, tensor), DTYPES[tensor.dtype], *strides


def _values(loss: str, name: str, tensor: Slot) -> tuple[int, ...]:
    """The same of a tensor with one value a row, or one for all of them."""
    if tensor is None:
        return ABSENT
    s = tensor.stride()
    strides = (0, 0, *s) if len(s) == 1 else (s[0], 0, s[1]) if s else (0, 0, 0)
    return address(loss, name, tensor), DTYPES[tensor.dtype], *strides


def _launch(
    call: RowsCall,
    input: Tensor,
    target: Tensor,
    weight: Slot,
    incoming: Slot,
    losses: Slot,
    total: Slot,
    grads: Sequence[Slot],
    run: Run,
) -> None:
    if weight is not None:
        compute = reduce.wide(input, target) if call.probabilities else reduce.wide(input)
        weight = weight.to(compute).contiguous()
    x = _flat(input, 2)
    flat_target = _flat(target, 2 if call.probabilities else 1)
    flat_incoming = None if incoming is None else _flat(incoming, 1)
    shape = x.shape
    n, c, d = (1, *shape[::-1]) if len(shape) == 2 else shape if len(shape) == 3 else (1, *shape, 1)
    arguments = PACK(
        n=n,
        c=c,
        d=d,
        probabilities=call.probabilities,
        mean=call.reduction == "mean",
        ignore_index=call.ignore_index,
        smoothing=call.smoothing,
        input=_classes(call.loss, "input", x),
        target=(_classes if call.probabilities else _values)(call.loss, "target", flat_target),
        weight=_values(call.loss, "weight", weight),
        incoming=_values(call.loss, "incoming", flat_incoming),
        loss=_values(call.loss, "losses", None if losses is None else _flat(losses, 1)),
        total=_values(call.loss, "loss", total),
        grad=_classes(call.loss, "gradient", grads[0]),
        grad_target=_classes(call.loss, "gradient", grads[1]),
    )
    outside = run(call.loss, call.loss, arguments, input.numel())
    if outside >= 0:
        errors.out_of_range(call.loss, target, outside, c, call.ignore_index)
