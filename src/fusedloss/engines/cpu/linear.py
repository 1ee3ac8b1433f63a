"""The row step of linear losses on the CPU: packs its arguments."""

from __future__ import annotations

import struct

from torch import Tensor

from ...kinds.distill import KINDS, DistillCall
from ...kinds.heads import LinearCall, Rows, Slot
from .load import DTYPES, library, run

SUMS = 8  # doubles of LinearSums in csrc/linear.h
ABSENT = (0, 0, 0, 0, 0)


def step(
    call: LinearCall,
    logits: Tensor,
    target: Tensor,
    weight: Slot,
    results: Rows,
    incoming: Rows | None = None,
    grad_target: Slot = None,
    *,
    first: int = 0,
    classes: int = 0,
    sums: Slot = None,
    low: Slot = None,
) -> None:
    """Fills `results` from a chunk (n, C) of logits; with `incoming` it becomes its gradient.

    `target` is (n) of int64, or (n, C). `results` and `incoming` are float64 for each row. A chunk
    may hold fewer than all `classes`, those from `first` on: then `sums` remember the row. `low` is
    what rounding took from the logits.
    """
    n, columns = logits.shape
    last = first + columns == (classes or columns)
    arguments = struct.pack(
        "=6q4d24q",
        *(n, classes or columns, first, columns, last, incoming is not None),
        *(call.smoothing, call.z_loss, call.softcap, call.logit_scale),
        *_logits(logits, low),
        0 if call.probabilities else target.data_ptr(),
        *(_grid(target) if call.probabilities else ABSENT),
        _pointer(weight),
        *map(_pointer, incoming[:3] if incoming else (None,) * 3),
        *map(_pointer, (sums, *results)),
        *_grid(grad_target),
    )
    run("fusedloss_linear", call.loss, arguments)


def distill(
    call: DistillCall,
    logits: Tensor,
    teacher: Tensor,
    target: Slot,
    results: Rows,
    incoming: Rows | None = None,
    low: Slot = None,
    teacher_low: Slot = None,
) -> None:
    """The same for the divergence from a teacher's logits (n, C)."""
    n, classes = logits.shape
    if teacher.stride(1) != 1:
        teacher = teacher.contiguous()
    arguments = struct.pack(
        "=4q4d4qd4qd3q",
        *(n, classes, KINDS.index(call.divergence), incoming is not None),
        *(call.beta, call.temperature, call.soft_weight, call.hard_weight),
        *(*_logits(logits, low), call.softcap),
        *(*_logits(teacher, teacher_low), call.teacher_softcap),
        *(_pointer(target), _pointer(incoming and incoming.loss), _pointer(results.loss)),
    )
    run("fusedloss_distill", call.loss, arguments)


def accumulate(terms: Tensor, sums: Tensor, add: bool) -> None:
    """sums += terms, or sums = terms: float32 and dense bfloat16, (R, D)."""
    arguments = struct.pack(
        "=6q", *terms.shape, sums.stride(0), add, sums.data_ptr(), terms.data_ptr()
    )
    run("fusedloss_accumulate", "linear", arguments)


def advise_huge_pages(tensor: Slot) -> None:
    """Large pages for memory that has not been touched yet."""
    if tensor is not None and tensor.is_cpu:
        library().fusedloss_advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


def _logits(logits: Tensor, low: Slot) -> tuple[int, ...]:
    return logits.data_ptr(), _pointer(low), DTYPES[logits.dtype], logits.stride(0)


def _pointer(tensor: Slot) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _grid(tensor: Slot) -> tuple[int, ...]:
    if tensor is None:
        return ABSENT
    return (tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.stride(), 0)
