"""The checks of losses of margins: rows of classes, and one label a row or a set of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import advice, errors
from ..core.reduce import result_dtype
from ..kinds.margins import MarginCall
from ..route.entry import dispatch
from ..route.memo import Asked
from . import docs
from .classes import INDICES
from .loss import Definition
from .settings import Setting
from .signature import Memo


class Hinge(NamedTuple):
    """What is summed over the gaps that are above 0: they, or their squares."""

    squared: bool = False
    margin: float = 1.0


def _power(function: str, argument: str, value: Any) -> int:
    if value != 1 and value != 2:
        words = f"{argument} must be 1 or 2, got {value!r}: only p == 1 and p == 2 supported"
        errors.fail(ValueError, function, words)
    return int(value)


one_or_two = Setting(_power, "ValueError: {argument} neither 1 nor 2")


@dataclass(repr=False, eq=False)
class Margins:
    """The input is (N, C), (C) or (); the target one class a row, or label sets of its shape."""

    kind: ClassVar[str] = "margins"
    computes: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    kernel: str  # PyTorch's word for what a type is lacking
    sets: bool = False

    def memo(self, loss: Definition) -> Memo:
        return loss.memo()

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        name, operands = loss.name, loss.tensors(given, TypeError)
        reduction, settings = loss.reduction(given), loss.checked(given)
        more = loss.more_tensors(given, AttributeError)
        input, target = operands.values()
        weight = more.get("weight")
        if weight is not None and weight.dim() != 1:
            words = f"weight must be one-dimensional, (C), got shape {list(weight.shape)}"
            errors.fail(ValueError, name, words)
        errors.same_device(name, **operands, **more)
        classes = self._check_shapes(name, input, target)
        if weight is not None and len(weight) != classes:
            words = f"inconsistent weight size, expected {classes} but got {list(weight.shape)}"
            errors.fail(RuntimeError, name, words)
        dtype = result_dtype(input.dtype, input)
        self._check_types(name, input, target, weight, dtype)
        loss.refuse_what_users_rue(operands, given, reduction=reduction)
        squared, margin = loss.body(**settings)
        call = MarginCall(name, self.sets, squared, margin, reduction, dtype)
        by = loss.divisor(given, reduction)
        return dispatch(name, call, (input, target, weight), None, asked, by)

    def _check_shapes(self, name: str, input: Tensor, target: Tensor) -> int:
        """The number of classes."""
        shape, given = list(input.shape), list(target.shape)
        if len(shape) > 2 or 0 in shape[-1:]:
            words = "Expected non-empty vector or matrix with optional 0-dim batch size, but got: "
            errors.fail(
                RuntimeError, name, f"{words}{shape}: input is (N, C) or (C), with C above 0"
            )
        if self.sets:
            alone = len(shape) < 2 and len(given) < 2 and target.numel() == input.numel()
            if given != shape and not alone:
                words = f"inconsistent target size: {given} for input of size: {shape}"
                hint = ": each row holds the labels of one of the input, then -1"
                errors.fail(RuntimeError, name, words + hint)
        elif len(given) > 1 or target.numel() != (shape[0] if len(shape) == 2 else 1):
            rows = shape[0] if len(shape) == 2 else 1
            errors.fail(
                RuntimeError,
                name,
                "target tensor should be 1-D with size equal to the number of input samples (batch size). "
                f"Expected target size {[rows]}, but got {given}. Input has shape {shape}. "
                # Before torch 2.12:
                f"(inconsistent target size, expected {rows} but got {given})",
            )
        return shape[-1] if shape else 1

    def _check_types(
        self,
        name: str,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        if target.dtype not in INDICES:
            errors.fail(
                RuntimeError,
                name,
                f"expected scalar type Long but found {errors.scalar_type(target.dtype)} for target: labels "
                f"are integers (target.long()){advice.swapped(input, target)}",
            )
        errors.not_narrow(name, self.kernel, NotImplementedError, input=input)
        if not input.is_floating_point():
            errors.not_floating(name, NotImplementedError, self.kernel, input=input)
        if weight is not None and result_dtype(weight.dtype, weight) is not dtype:
            own = errors.scalar_type(dtype)
            words = f"expected scalar type {own} but found {errors.scalar_type(weight.dtype)} for weight"
            errors.fail(RuntimeError, name, f"{words}: pass weight.to(input.dtype)")

    def words(self, loss: Definition) -> docs.Words:
        returns = (
            "A scalar, or the losses of all rows with 'none', in the input's type; float32 under autocast. "
            "'mean' over no row is NaN."
        )
        raises = (
            "RuntimeError: a label out of range; its position is named",
            "ValueError: unknown `reduction`",
            "RuntimeError: an input of more than 2 dimensions, or of no class; a target of another shape, or "
            "not of integers; devices that differ",
            "NotImplementedError: integer or complex input",
            "TypeError: an argument that is no tensor",
        )
        of_weight = (
            "ValueError: a weight that is not 1-D",
            "RuntimeError: a weight of another size or type",
        )
        return docs.Words(returns, (*raises, *(of_weight if "weight" in loss.optional else ())))
