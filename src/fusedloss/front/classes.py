"""The checks of a loss of rows of classes: shapes, class indices or probabilities, class weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import advice, errors
from ..core.reduce import result_dtype
from ..kinds.rows import RowsCall
from ..route import class_groups
from ..route.entry import dispatch
from ..route.memo import Asked
from . import docs
from .loss import Definition
from .signature import Memo

INDICES = frozenset(
    {
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    }
)


class Counted(NamedTuple):
    """Which rows count, and how."""

    ignore_index: int
    smoothing: float = 0.0
    gamma: float = 0.0


@dataclass(repr=False, eq=False)
class Classes:
    """The input is (C), (N, C) or (N, C, d1, ...); the target holds class indices, or probabilities."""

    kind: ClassVar[str] = "rows"
    computes: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    kernel: str  # PyTorch's word for what a type is lacking
    softmax: bool = False  # the input holds logits
    soft: bool = False  # the target may hold probabilities

    def memo(self, loss: Definition) -> Memo:
        return loss.memo()

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        if given.get("class_group") is None:
            return self._run(loss, asked, given)

        def run() -> Tensor:
            own = class_groups.settle(loss.name, given, class_groups.of_rows)
            return self._run(loss, None, own)

        found: Tensor = class_groups.untraced(run)
        return found

    def _run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        name, shard = loss.name, given.get("class_group")
        operands, more = loss.tensors(given, TypeError), loss.more_tensors(given, TypeError)
        input, target = operands.values()
        weight = more.get("weight")
        ignore_index, smoothing, gamma = loss.chosen(given, loss.checked(given))
        reduction = loss.reduction(given)
        if more or target.device != input.device:
            errors.same_device(name, **operands, **more)
        whole = input if shard is None else shard.like_whole(input, min(input.dim() - 1, 1))
        probabilities = self.soft and target.shape == input.shape
        if probabilities:
            dtype = self._check_probabilities(name, input, target, ignore_index)
            dtype = self._with_weight(name, whole, dtype, weight)
        else:
            # Of images and the like PyTorch takes a class weight of any shape.
            weight = weight.flatten() if weight is not None and input.dim() > 2 else weight
            dtype = result_dtype(input.dtype, input)
            if self.softmax:
                self._check_input(name, input, target)
            check_indices(name, whole, target, weight, dtype)
            if not self.softmax:
                self._check_input(name, input, target)
        call = RowsCall(name, probabilities, reduction, ignore_index, smoothing, dtype, gamma)
        by = loss.divisor(given, reduction)
        if shard is not None:
            from ..route import logits

            return logits.run(call, shard, input, target, weight, by)
        seen = {"reduction": reduction, "ignore_index": ignore_index}
        loss.refuse_what_users_rue(operands, given, **seen)
        why = None
        if probabilities and input.numel() == 0 and input.shape[min(input.dim() - 1, 1)] == 0:
            why = "there are no classes"
        return dispatch(name, call, (input, target, weight), why, asked, by)

    def _check_probabilities(
        self, name: str, input: Tensor, target: Tensor, ignore_index: int
    ) -> torch.dtype:
        """The type of the result, without a weight."""
        if not target.is_floating_point() or not input.dim():
            errors.fail(
                RuntimeError,
                name,
                "Expected floating point type for target with class probabilities, got "
                f"{target.dtype}: a target of the input's shape {list(input.shape)} holds "
                "probabilities, class indices lack the class dimension" + _meant(input),
            )
        if ignore_index >= 0:
            errors.fail(
                RuntimeError,
                name,
                "ignore_index is not supported for floating point target, got ignore_index = "
                f"{ignore_index}",
            )
        self._check_input(name, input, target)
        return torch.promote_types(result_dtype(input.dtype, input), target.dtype)

    def _with_weight(
        self, name: str, input: Tensor, dtype: torch.dtype, weight: Tensor | None
    ) -> torch.dtype:
        if weight is None:
            return dtype
        check_weight(name, input, weight)
        if weight.is_complex():
            errors.not_floating(name, RuntimeError, "mul", weight=weight)
        return torch.promote_types(dtype, weight.dtype)

    def _check_input(self, name: str, input: Tensor, target: Tensor) -> None:
        if not input.is_floating_point():
            hint = advice.swapped(input, target)
            errors.not_floating(name, NotImplementedError, self.kernel, hint, input=input)
        errors.not_narrow(name, self.kernel, input=input, target=target)

    def words(self, loss: Definition) -> docs.Words:
        promoted = " (for probabilities, in the type that both promote to)"
        returns = (
            "A scalar, or the losses of all rows with 'none', in the input's type"
            f"{promoted if self.soft else ''}; float32 under autocast. 'mean' over no row is NaN."
        )
        raises = (
            "IndexError: a class index out of range; its position is named",
            "ValueError: unknown `reduction`; batch sizes that differ; a 0-dim input",
            "RuntimeError: other shapes that do not fit; a weight not of shape (C) or of another type",
            "RuntimeError: devices that differ; a target that is not integer"
            + (", nor floating" if self.soft else ""),
            "NotImplementedError: integer or complex input",
            "TypeError: an argument that is no tensor",
        )
        return docs.Words(returns, raises)


def _meant(input: Tensor) -> str:
    """Of an integer target in the input's shape."""
    if input.dim() == 1:
        return (
            ". One logit a row is for binary_cross_entropy_with_logits, with target.float(); of one row, "
            "pass input.unsqueeze(0)"
        )
    return ": of a one-hot one pass target.argmax(1), or target.float()" if input.dim() else ""


def check_indices(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype
) -> None:
    """Shapes and types of a call with class indices; the range is the kernel's to check.

    `dtype` is that of the result, which the weight must have: under autocast every half type counts as it.
    """
    shape, wanted = input.shape, target.shape
    if not shape:
        errors.fail(
            ValueError, name, "Expected 1 or more dimensions (got 0): input is (C), (N, C) or more"
        )
    if len(shape) == 1:
        if wanted not in ((), (1,)):
            errors.fail(
                ValueError if len(wanted) == 1 else RuntimeError,
                name,
                "For 1D input, 1D target must have size 1, but got target size: "
                f"{wanted[0] if len(wanted) == 1 else list(wanted)}{advice.swapped(input, target)}",
            )
    elif wanted != (shape[:1] if len(shape) == 2 else shape[:1] + shape[2:]):
        _bad_shape(name, shape, target)
    if target.dtype not in INDICES:
        errors.fail(
            RuntimeError,
            name,
            f"expected target dtype to be Long or Byte (any integer type serves), but got "
            f"{target.dtype}: class indices are integers (target.long())"
            + (
                f", class probabilities have the input's shape {list(shape)}"
                if name == "cross_entropy"
                else ""
            ),
        )
    if weight is None:
        return
    check_weight(name, input, weight)
    if input.is_floating_point() and result_dtype(weight.dtype, weight) is not dtype:
        errors.fail(
            RuntimeError,
            name,
            f"expected scalar type {errors.scalar_type(dtype)} but found "
            f"{errors.scalar_type(weight.dtype)} for weight: pass weight.to(input.dtype)",
        )


def _bad_shape(name: str, shape: torch.Size, target: Tensor) -> None:
    fits, wanted = list(shape[:1] + shape[2:]), target.shape
    of_head = name.startswith("linear_")
    hint = advice.class_target(
        shape, target, name == "cross_entropy", of_head, name.startswith("dice_")
    )
    if not wanted or wanted[0] != shape[0]:
        errors.fail(
            ValueError if wanted or shape[0] else IndexError if len(shape) == 2 else RuntimeError,
            name,
            f"Expected input batch_size ({shape[0]}) to match target batch_size "
            f"({wanted[0] if wanted else 'none'}): input {list(shape)}, target {list(wanted)}{hint}",
        )
    if len(shape) == 2 and len(wanted) > 1:
        errors.fail(
            RuntimeError,
            name,
            f"0D or 1D target tensor expected, multi-target not supported: input {list(shape)} needs "
            f"a target {fits}, got {list(wanted)}{hint}",
        )
    errors.fail(
        RuntimeError,
        name,
        f"size mismatch (got input: {list(shape)}, target: {list(wanted)}). Expected target size "
        f"{fits}, got {list(wanted)}{hint}",
    )


def check_weight(name: str, input: Tensor, weight: Tensor) -> None:
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    if weight.shape != (classes,):
        errors.fail(
            RuntimeError,
            name,
            f"weight tensor should be defined either for all {classes} classes or no classes but "
            f"got weight tensor of shape: {list(weight.shape)}",
        )
