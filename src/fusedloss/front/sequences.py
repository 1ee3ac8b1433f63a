"""The checks of a loss of sequences of different lengths, each with labels of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import errors
from ..core.reduce import result_dtype
from ..kinds.ctc import CtcCall
from ..route.entry import dispatch
from ..route.memo import Asked
from . import docs
from .classes import INDICES
from .loss import Definition
from .signature import Memo

LENGTHS = ("input_lengths", "target_lengths")


@dataclass(repr=False, eq=False)
class Sequences:
    """The input is (T, N, C) or (T, C); labels are (N, S), or all of them in one row."""

    kind: ClassVar[str] = "sequences"
    computes: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    kernel: str  # PyTorch's word for what a type is lacking

    def memo(self, loss: Definition) -> Memo:
        """Of lengths that are tensors; what they hold is looked at where the call is laid out."""
        return loss.memo()

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        name, reduction, settings = loss.name, loss.reduction(given), loss.checked(given)
        log_probs, targets = given["log_probs"], given["targets"]
        errors.tensors(name, TypeError, log_probs=log_probs, targets=targets)
        blank, zero_infinity = loss.body(**settings)
        self._check_input(name, log_probs)
        n = log_probs.shape[1] if log_probs.dim() == 3 else 1
        inputs, counts = _lengths(name, given, n)
        targets = _labels(name, targets, n)
        classes = log_probs.shape[-1]
        if not 0 <= blank < classes:
            errors.fail(
                RuntimeError,
                name,
                f"blank = {blank} is out of range for {classes} classes: blank must be in label range, from "
                f"0 to {classes - 1}",
            )
        dtype = result_dtype(log_probs.dtype, log_probs)
        call = CtcCall(blank, reduction, zero_infinity, dtype)
        tensors = (log_probs, targets.to(log_probs.device), inputs, counts)
        return dispatch(name, call, tensors, None, asked, loss.divisor(given, reduction))

    def _check_input(self, name: str, log_probs: Tensor) -> None:
        if log_probs.dim() not in (2, 3):
            errors.fail(
                RuntimeError if log_probs.dim() else IndexError,
                name,
                f"log_probs must be (T, N, C) or (T, C), got {list(log_probs.shape)}: Expected "
                f"3-dimensional tensor, but got {log_probs.dim()}-dimensional tensor for argument #1 "
                "'log_probs'",
            )
        if not log_probs.is_floating_point():
            errors.not_floating(name, NotImplementedError, self.kernel, log_probs=log_probs)
        errors.not_narrow(name, self.kernel, log_probs=log_probs)
        if not log_probs.numel():
            words = f"log_probs tensor must not be empty, got {list(log_probs.shape)}"
            errors.fail(RuntimeError, name, words)

    def words(self, loss: Definition) -> docs.Words:
        returns = (
            "A scalar, or the losses of all sequences with 'none', in the input's type; float32 under "
            "autocast."
        )
        raises = (
            "IndexError: a label out of range; its position is named",
            "ValueError: unknown `reduction`",
            "RuntimeError: other shapes that do not fit; lengths that are negative, no integers, or beyond "
            "the frames or labels that there are; `blank` that is no class",
            "NotImplementedError: integer or complex input",
            "TypeError: an argument that is no tensor; lengths that are neither tensors nor lists of integers",
        )
        return docs.Words(returns, raises)


def _lengths(name: str, given: dict[str, Any], n: int) -> list[Tensor]:
    """Of the n sequences, both on the host."""
    lengths = {k: given[k] for k in LENGTHS}
    if not all(isinstance(v, Tensor) for v in lengths.values()):
        for argument, value in lengths.items():
            if not isinstance(value, (list, tuple)):
                words = f"argument '{argument}' must be list or tuple of ints, as the other is"
                if not any(isinstance(v, (list, tuple)) for v in lengths.values()):
                    words = f"argument '{argument}' must be Tensor, or list or tuple of ints"
                errors.fail(TypeError, name, f"{words}, not {type(value).__name__}")
    found = []
    for argument, value in lengths.items():
        if not isinstance(value, Tensor):
            integers = (errors.integer(name, f"{argument}[{k}]", v) for k, v in enumerate(value))
            value = torch.tensor(list(integers), dtype=torch.int64, device="cpu")
        if value.dtype not in INDICES:
            words = f"{argument} must be integral, got {value.dtype}: pass {argument}.long()"
            errors.fail(RuntimeError, name, words)
        if value.numel() != n:
            words = f"{argument} must be of size batch_size, {n}, got {list(value.shape)}"
            errors.fail(RuntimeError, name, words)
        found.append(value.to(device="cpu" if value.is_cuda else value.device, dtype=torch.int64))
    return found


def _labels(name: str, targets: Tensor, n: int) -> Tensor:
    if targets.dim() not in (1, 2):
        errors.fail(
            RuntimeError,
            name,
            f"targets must be (N, S), or hold all labels in one row, got {list(targets.shape)}: Expected 1 "
            f"to 2 dimensions, but got {targets.dim()}-dimensional tensor for argument #2 'targets'",
        )
    if targets.dim() == 2 and targets.shape[0] != n:
        errors.fail(
            RuntimeError,
            name,
            f"targets {list(targets.shape)} must have a row for each of {n} sequences: Expected tensor to "
            f"have size {n} at dimension 0, but got size {targets.shape[0]} for argument #2 'targets'",
        )
    return targets if targets.dtype in INDICES else targets.to(torch.int64)
