"""The row step of linear losses on the CPU: packs its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall, Rows, Slot
from .. import abi
from .load import DTYPES, library, run

PACK, PACK_DISTILL = abi.LINEAR.packer(), abi.DISTILL.packer()
PACK_ACCUMULATE, PACK_MERGE = abi.ACCUMULATE.packer(), abi.MERGE.packer()


class Logits(NamedTuple):
    """Of rows (n, C); `lost` is what rounding took from them, the bias (C) of the type that is computed in."""

    values: Tensor
    lost: Slot = None
    bias: Slot = None


class Stretch(NamedTuple):
    """Which classes a chunk holds, if not all: what `sums` remember of the row is of those before, too."""

    first: int
    classes: int  # in all
    begin: bool = True  # they are the first ones
    finish: bool = True  # the last ones
    origin: int = 0  # of this process the first class; probabilities are given from it on
    given: bool = False  # the sums are of all classes already


def step(
    call: LinearCall,
    logits: Logits,
    target: Tensor,
    weight: Slot,
    results: Rows,
    incoming: Rows | None = None,
    grad_target: Slot = None,
    *,
    stretch: Stretch | None = None,
    sums: Slot = None,
    ordinary: float = 0.0,
    beyond: Slot = None,
) -> int:
    """Fills `results` from a chunk (n, C) of logits; with `incoming` it becomes its gradient.

    `target` is (n) of int64, or (n, C). `results` and `incoming` are float64 for each row. Where `beyond`
    is given, rows whose largest logit is beyond what is `ordinary` stay as they are, and it tells which:
    so many are returned.
    """
    n, columns = logits.values.shape
    own = stretch or Stretch(0, columns)
    arguments = PACK(
        n=n,
        c=own.classes,
        first=own.first,
        columns=columns,
        origin=own.origin,
        begin=own.begin,
        finish=own.finish,
        given=own.given,
        differentiate=incoming is not None,
        smoothing=call.smoothing,
        z_loss=call.z_loss,
        softcap=call.softcap,
        logit_scale=call.logit_scale,
        logits=_logits(logits),
        label=0 if call.probabilities else target.data_ptr(),
        target=_grid(target if call.probabilities else None),
        weight=_pointer(weight),
        incoming=_pointer(incoming and incoming.loss),
        incoming_lse=_pointer(incoming and incoming.lse),
        incoming_entropy=_pointer(incoming and incoming.entropy),
        sums=_pointer(sums),
        loss=_pointer(results.loss),
        lse=_pointer(results.lse),
        entropy=_pointer(results.entropy),
        correct=_pointer(results.correct),
        grad_target=_grid(grad_target),
        ordinary=ordinary,
        beyond=_pointer(beyond),
    )
    return run("linear", call.loss, arguments)


def merge(call: LinearCall, parts: Tensor) -> Tensor:
    """Of the sums (k, n, 8) of k processes, each of its own classes, those of all; of two heads (k, n, 12).

    These leave place for the rest of the 16.
    """
    ranks, n, _ = parts.shape
    sums = parts.new_empty(n, call.sums)
    kernel, temperature = "merge", 1.0
    if isinstance(call, DistillCall):
        kernel, temperature = "merge_divergences", call.temperature
    arguments = PACK_MERGE(
        n=n,
        ranks=ranks,
        labelled=not call.probabilities,
        temperature=temperature,
        parts=parts.data_ptr(),
        sums=sums.data_ptr(),
    )
    run(kernel, call.loss, arguments)
    return sums


def distill(
    call: DistillCall,
    logits: Logits,
    teacher: Logits,
    target: Slot,
    results: Rows | None,
    incoming: Rows | None = None,
    ordinary: float = 0.0,
    teacher_ordinary: float = 0.0,
    beyond: Slot = None,
    *,
    phase: str = "WHOLE",
    first: int = 0,
    sums: Slot = None,
) -> int:
    """The same for the divergence from a teacher's logits (n, C); of a shard from class `first` on, a phase."""
    n, classes = logits.values.shape
    if teacher.values.stride(1) != 1:
        teacher = teacher._replace(values=teacher.values.contiguous())
    arguments = PACK_DISTILL(
        n=n,
        c=classes,
        phase=abi.PHASES.index(phase),
        first=first,
        **of_divergence(call),
        differentiate=incoming is not None,
        softcap=call.softcap,
        student=_logits(logits),
        teacher=_logits(teacher),
        label=_pointer(target),
        incoming=_pointer(incoming and incoming.loss),
        sums=_pointer(sums),
        loss=_pointer(results and results.loss),
        ordinary=ordinary,
        teacher_ordinary=teacher_ordinary,
        beyond=_pointer(beyond),
    )
    return run("distill", call.loss, arguments)


def of_divergence(call: DistillCall) -> dict[str, Any]:
    """The settings of the divergence, as the kernel takes them."""
    return {
        "of_teacher": call.divergence != "reverse",
        "of_student": call.divergence != "forward",
        "beta": call.beta,
        "temperature": call.temperature,
        "soft_weight": call.soft_weight,
        "hard_weight": call.hard_weight,
        "teacher_softcap": call.teacher_softcap,
    }


def accumulate(terms: Tensor, sums: Tensor, add: bool) -> None:
    """sums += terms, or sums = terms: float32 and dense bfloat16, (R, D)."""
    rows, columns = terms.shape
    arguments = PACK_ACCUMULATE(
        rows=rows,
        columns=columns,
        stride=sums.stride(0),
        add=add,
        sums=sums.data_ptr(),
        terms=terms.data_ptr(),
    )
    run("accumulate", "linear", arguments)


def advise_huge_pages(tensor: Slot) -> None:
    """Large pages for memory that has not been touched yet."""
    if tensor is not None and tensor.is_cpu:
        library().fusedloss_advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


def _logits(logits: Logits) -> tuple[int, ...]:
    values, *rest = logits
    return values.data_ptr(), *map(_pointer, rest), DTYPES[values.dtype], values.stride(0)


def _pointer(tensor: Slot) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _grid(tensor: Slot) -> tuple[int, ...]:
    if tensor is None:
        return abi.GRID.absent
    return (tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.stride(), 0)
