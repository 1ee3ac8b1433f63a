"""The checks of losses of vectors, whose features are the last dimension: of triplets, and of pairs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.plain import check as check_memory
from ..core.reduce import result_dtype
from ..kinds.formula import Pointwise
from ..kinds.pointwise import PointwiseCall
from ..kinds.reduction import Distances, Reduction, ReductionCall
from ..route.entry import dispatch
from ..route.memo import Asked
from . import docs
from .loss import Definition
from .signature import Memo

RAISES = (
    "ValueError: unknown `reduction`",
    "RuntimeError: numbers of dimensions that differ; shapes that do not broadcast; devices that differ",
    "TypeError: an argument that is no tensor",
)


class Norms(NamedTuple):
    """p-norms of differences, and a loss of these."""

    record: Reduction
    p: float
    eps: float
    margin: float

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        assert isinstance(self.record.measure, Distances)
        return self.record.measure.pairs


@dataclass(repr=False, eq=False)
class Triplets:
    """Anchor, positive and negative; the definition's function gives the settings of the distance."""

    kind: ClassVar[str] = "triplet"
    computes: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    def memo(self, loss: Definition) -> Memo:
        return loss.memo()

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        reduction, settings = loss.reduction(given), loss.checked(given)
        operands = loss.tensors(given, TypeError)
        check(loss.name, **operands)
        tensors = tuple(operands.values())
        by = loss.divisor(given, reduction)
        return run(loss.name, tensors, loss.body(**settings), reduction, asked, by)

    def words(self, loss: Definition) -> docs.Words:
        returns = (
            "A scalar, or the losses of all triplets with 'none', in the type that the inputs promote to "
            "(float32 under autocast)."
        )
        return docs.Words(returns, (*RAISES, "RuntimeError: the inf norm of no coordinates"))


@dataclass(repr=False, eq=False)
class Pairs:
    """Two vectors, or batches of these, and a number for each pair; the function gives the settings."""

    kind: ClassVar[str] = "pair"
    computes: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    record: Reduction

    def memo(self, loss: Definition) -> Memo:
        return loss.memo()

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        name, operands = loss.name, loss.tensors(given, TypeError)
        settings, reduction = loss.checked(given), loss.reduction(given)
        first, second, target = operands.values()
        _check_pairs(name, operands)
        errors.same_device(name, **operands)
        errors.not_narrow(name, "mul", **operands)
        if first.is_complex() or second.is_complex():
            of_pairs = {n: operands[n] for n in tuple(operands)[:2]}
            errors.not_floating(name, NotImplementedError, "clamp", **of_pairs)
        shape = errors.broadcast(name, **dict(zip(operands, (first, second), strict=False)))
        rows = errors.broadcast(name, pairs=first.new_empty(shape[:-1]), target=target)
        dtype = torch.promote_types(first.dtype, second.dtype)
        if not (first.is_floating_point() and second.is_floating_point()):
            dtype = torch.promote_types(dtype, torch.get_default_dtype())  # of a square and eps
        named = {"input": first, "target": target}
        loss.refuse_what_users_rue(named, given, reduction=reduction)
        spread = rows if rows != shape[:-1] else None  # the target broadcasts them
        tensors = _laid_out(first, second, target, spread)
        if asked and (spread is not None or tensors[2] is not target):
            asked = asked._replace(make=functools.partial(_relaid, spread))
        why = None if first.shape[-1] == second.shape[-1] else "the features broadcast"
        call = ReductionCall(
            self.record.name, loss.body(**settings), reduction, result_dtype(dtype, first)
        )
        return dispatch(name, call, tensors, why, asked, loss.divisor(given, reduction))

    def words(self, loss: Definition) -> docs.Words:
        returns = (
            "A scalar, or the losses of all pairs with 'none', in the type that the inputs promote to "
            "(float32 under autocast)."
        )
        raises = (
            "ValueError: unknown `reduction`",
            "RuntimeError: a target of other than 0 or 1 dimensions, inputs of other than one more; shapes "
            "that do not broadcast; devices that differ",
            "NotImplementedError: complex inputs",
            "TypeError: an argument that is no tensor",
        )
        return docs.Words(returns, raises)


def _check_pairs(name: str, operands: dict[str, Tensor]) -> None:
    *inputs, target = operands.values()
    dims = target.dim()
    if dims > 1:
        words = "0D or 1D target tensor expected, multi-target not supported: target has shape "
        hint = ": pass target.flatten()" if target.numel() == max(target.shape) else ""
        errors.fail(RuntimeError, name, f"{words}{list(target.shape)}{hint}")
    if not all(t.dim() == dims + 1 for t in inputs):
        sizes = " and ".join(str(list(t.shape)) for t in inputs)
        errors.fail(
            RuntimeError,
            name,
            f"{dims}D target tensor expects {dims + 1}D input tensors, but found inputs with sizes {sizes}. "
            "A pair has a number, (), and a batch of N pairs (N)",
        )


@dataclass(repr=False, eq=False)
class MeanOfClasses:
    """A row of classes, whose losses are averaged: with a target of its shape, and maybe a weight.

    Reduced, it is the loss `of_class` of all elements alike, which needs no sums of rows.
    """

    kind: ClassVar[str] = "multilabel"
    computes: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    record: Reduction
    weighted: Reduction
    of_class: Pointwise

    def memo(self, loss: Definition) -> Memo:
        return loss.memo()

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        name, operands = loss.name, loss.tensors(given, TypeError)
        more, reduction = loss.more_tensors(given, TypeError), loss.reduction(given)
        every = {**operands, **more}
        input = operands["input"]
        errors.same_device(name, **every)
        if not input.dim():
            words = "input has no dimension of classes: pass input.unsqueeze(0). Dimension specified as -1 "
            errors.fail(IndexError, name, f"{words}but tensor has no dimensions")
        errors.not_narrow(name, "log_sigmoid_cpu", **every)
        for argument, tensor in every.items():
            if tensor.is_complex() or not input.is_floating_point():
                errors.not_floating(
                    name, NotImplementedError, "log_sigmoid_cpu", **{argument: tensor}
                )
        for argument, tensor in every.items():
            if tensor.dim() > input.dim():
                words = f"{argument} {list(tensor.shape)} has more dimensions than input {list(input.shape)}"
                errors.fail(RuntimeError, name, f"{words}, whose last one is that of the classes")
        errors.broadcast(name, **every)
        dtype = functools.reduce(
            torch.promote_types,
            (t.dtype for t in every.values() if t.dim() and t.is_floating_point()),
        )
        loss.refuse_what_users_rue(operands, given, reduction=reduction)
        _check_memory(name, every)
        kept = [t if t.is_floating_point() else t.to(input.dtype) for t in every.values()]
        tensors = (*kept, None)[:3]
        classes, dtype = input.shape[-1], result_dtype(dtype, input)
        by = loss.divisor(given, reduction)
        call: PointwiseCall | ReductionCall
        if reduction != "none" and self._alike(input, tensors):
            of_sum = classes if reduction == "sum" else None
            call = PointwiseCall(self.of_class, (), "mean", of_sum, dtype)
            if by is not None:
                by, asked = by * classes, None  # which is not what was asked
        else:
            record = self.weighted if more else self.record
            call = ReductionCall(record.name, (float(classes or math.nan),), reduction, dtype)
        return dispatch(name, call, tensors, None, asked, by)

    def _alike(self, input: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether each element of the input counts once; a weight only learns by the sums of rows."""
        whole = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
        weight = tensors[2]
        return (
            whole == input.shape
            and input.numel() > 0
            and not (weight is not None and weight.requires_grad)
        )

    def words(self, loss: Definition) -> docs.Words:
        returns = (
            "A scalar, or the losses of all rows with 'none', in the type that the operands promote to "
            "(float32 under autocast)."
        )
        raises = (
            "ValueError: unknown `reduction`",
            "IndexError: a 0-dim input",
            "RuntimeError: shapes that do not broadcast; a target or weight of more dimensions than the input; "
            "devices that differ",
            "NotImplementedError: an input that is not floating point; a complex operand",
            "TypeError: an argument that is no tensor",
        )
        return docs.Words(returns, raises)


def _check_memory(name: str, tensors: dict[str, Tensor]) -> None:
    if not all(t.is_floating_point() for t in tensors.values()):
        check_memory(name, **tensors)


def _relaid(rows: torch.Size | None, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first, second, target = tensors
    return _laid_out(first, second, target, rows)


def _laid_out(
    first: Tensor, second: Tensor, target: Tensor, rows: torch.Size | None
) -> tuple[Tensor, Tensor, Tensor]:
    return first if rows is None else first.expand(*rows, -1), second, _labels(target)


def _labels(target: Tensor) -> Tensor:
    """1, -1 or another number for each pair, in a floating point type, and without derivatives."""
    if not target.is_floating_point():
        similar, different = target == 1, target == -1
        return similar.to(torch.float32) - different.to(torch.float32)
    return target.detach() if target.requires_grad else target


def check(name: str, anchor: Tensor, positive: Tensor, negative: Tensor) -> None:
    if not anchor.device == positive.device == negative.device:
        errors.same_device(name, anchor=anchor, positive=positive, negative=negative)
    if not anchor.dim() == positive.dim() == negative.dim():
        errors.fail(
            RuntimeError,
            name,
            "The anchor, positive, and negative tensors are expected to have the same number of "
            f"dimensions, but got: anchor {anchor.dim()}D, positive {positive.dim()}D, and negative "
            f"{negative.dim()}D inputs",
        )


def run(
    name: str,
    tensors: tuple[Tensor, ...],
    norms: Norms,
    reduction: str,
    asked: Asked | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    anchor, positive, negative = tensors
    errors.not_narrow(name, "add_stub", anchor=anchor, positive=positive, negative=negative)
    dtype = anchor.dtype
    if not anchor.shape == positive.shape == negative.shape:
        errors.broadcast(name, anchor=anchor, positive=positive, negative=negative)
    for other in tensors[1:]:
        if other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    if dtype != anchor.dtype or dtype != positive.dtype or dtype != negative.dtype:
        # The distance of two integer tensors has the default type, whatever the third is.
        for pair in norms.pairs:
            if not any(tensors[k].is_floating_point() or tensors[k].is_complex() for k in pair):
                dtype = torch.promote_types(dtype, torch.get_default_dtype())
    if dtype.is_complex:
        dtype = dtype.to_real()
    elif not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    if norms.p == math.inf and anchor.dim() and 0 in {t.shape[-1] for t in tensors}:
        errors.fail(
            RuntimeError,
            name,
            "linalg.vector_norm cannot compute the inf norm on the last dimension because it is empty",
        )
    why = None if anchor.dim() else "the inputs are 0-dim"
    if anchor.dim() and not anchor.shape[-1] == positive.shape[-1] == negative.shape[-1]:
        why = "the features broadcast"  # each distance is taken over those of its own two tensors
    dtype = result_dtype(dtype, anchor)
    numbers = (float(norms.p), float(norms.eps), norms.margin)
    call = ReductionCall(norms.record.name, numbers, reduction, dtype)
    return dispatch(name, call, tensors, why, asked, denominator)
