"""The checks of a loss of each element: types, shapes, weights, in the order in which PyTorch's are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import errors, sharded, trace
from ..core.plain import check as check_memory
from ..core.reduce import exact as exact_of
from ..core.reduce import result_dtype, sum_of, total, wide
from ..kinds.formula import Pointwise
from ..kinds.pointwise import PointwiseCall
from ..kinds.torch_m import OutsideDomain
from ..route.entry import dispatch
from ..route.memo import Asked, conversion
from . import docs
from .loss import OF_BATCH, Definition
from .operands import Shapes, Tensors, Types, warn
from .signature import Memo


class Reduction(NamedTuple):
    name: str
    warning: str = ""  # what is said of it each time
    by_batch: bool = False  # whether the result is divided by the batch size once more


def plain_reduction(loss: Definition, given: dict[str, Any]) -> Reduction:
    return Reduction(loss.reduction(given))


# What a weight may be


class Weighed(NamedTuple):
    weight: Tensor
    dtype: torch.dtype
    by_weights: bool = False  # 'mean' divides by their sum


@dataclass(repr=False, eq=False)
class Weight:
    """`prepare` checks the weight, and says what 'mean' divides by."""

    prepare: Callable[[str, str, Tensors, Tensor, torch.dtype, str], Weighed]
    no_tensor: type[Exception]
    raises: str


def like_input(mean_by: str) -> Weight:
    """Of the input's shape. 'mean' divides by the weights' "sum", or by the "count" of elements."""

    def prepare(
        name: str,
        kernel: str,
        operands: Tensors,
        weight: Tensor,
        dtype: torch.dtype,
        reduction: str,
    ) -> Weighed:
        input, target = operands["input"], operands["target"]
        check_memory(name, **operands, weight=weight)
        if weight.shape != input.shape:
            words = f"weight has shape {list(weight.shape)}, input {list(input.shape)}"
            words = f"Weights and input must have the same size. {words}"
            errors.fail(ValueError, name, words)
        if weight.is_complex():
            errors.not_floating(name, NotImplementedError, kernel, weight=weight)
        # A 0-dim one yields to the losses' type, but its sum not to that of theirs.
        divides = reduction == "mean" and mean_by == "sum"
        if divides or weight.dim() or not (target.dim() and dtype.is_floating_point):
            dtype = torch.promote_types(dtype, weight.dtype)
        if weight.dtype is torch.float64:  # the kernel computes in the widest type of its operands
            operands["input"] = input.double()
        return Weighed(weight, dtype, mean_by == "sum")

    return Weight(prepare, AttributeError, "ValueError: `weight` of another shape than `input`")


def broadcasting(no_tensor: type[Exception]) -> Weight:
    """Of any shape that broadcasts to the input's; 'mean' divides by the number of elements."""

    def prepare(
        name: str,
        kernel: str,
        operands: Tensors,
        weight: Tensor,
        dtype: torch.dtype,
        reduction: str,
    ) -> Weighed:
        input = operands["input"]
        errors.expands(name, input.shape, weight=weight)
        return Weighed(floating(name, input, weight=weight), dtype)

    return Weight(prepare, no_tensor, "RuntimeError: a weight that does not broadcast")


def floating(name: str, input: Tensor, **given: Tensor) -> Tensor:
    """Integer weights are as good as others."""
    (weight,) = given.values()
    if weight.is_complex():
        errors.not_floating(name, RuntimeError, name, **given)
    if weight.is_floating_point():
        return weight
    check_memory(name, **given)
    return weight.to(input.dtype)


@dataclass(repr=False, eq=False)
class Elements:
    """The operands have one shape, or broadcast; the definition's function chooses the formula."""

    kind: ClassVar[str] = "pointwise"
    computes: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    types: Types
    shapes: Shapes = warn
    weight: Weight | None = None
    no_tensor: type[Exception] = AttributeError
    reduction: Callable[[Definition, dict[str, Any]], Reduction] = plain_reduction
    arranged: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None  # of the arguments
    instead: Callable[..., Elements | None] | None = None  # what checks it with some settings

    def memo(self, loss: Definition) -> Memo:
        defaults = {n: p.default for n, p in loss.signature.parameters.items()}
        formula, _ = self.chosen(loss, {n: defaults[n] for n in loss.settings}, {})
        return loss.memo(formula.domain is not None)

    def chosen(
        self, loss: Definition, settings: dict[str, Any], further: Tensors
    ) -> tuple[Pointwise, tuple[float, ...]]:
        """The formula and its numbers, by the settings and the further operands that there are."""
        whole = dict.fromkeys(loss.named) if loss.alone else {}
        found = loss.body(**{**whole, **settings}, **{n: further.get(n) for n in loss.further})
        return (found, ()) if isinstance(found, Pointwise) else found

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Tensor:
        name = loss.name
        if self.arranged:
            given = self.arranged(name, given)
        operands = loss.tensors(given, self.no_tensor)
        more = loss.more_tensors(given, self.weight.no_tensor if self.weight else self.no_tensor)
        settings = loss.checked(given)
        if self.instead and (other := self.instead(**settings)):
            return other.run(loss, asked, given)
        reduction, warning, by_batch = self.reduction(loss, given)
        first, *others = operands.values()
        differ = any(t.shape != first.shape for t in others)
        if differ and not self.shapes.late:
            self.shapes.check(name, operands)
        if more or any(t.device != first.device for t in others):
            errors.same_device(name, **operands, **more)
        weight = more.pop("weight", None)
        of_batch = more.pop(OF_BATCH, None)
        dtype = self.types.check(name, operands, weight, self.shapes)
        if differ and self.shapes.late:
            self.shapes.check(name, operands)
        loss.refuse_what_users_rue(operands, given, reduction=reduction, **settings)
        by = loss.divisor(given, reduction)
        if differ and self.shapes.warns:
            warning = errors.broadcasts(name, first, others[0])
        if warning:
            errors.warn(warning)
        if self.types.anything and not dtype.is_floating_point:
            return sharded.settled(
                self.by_torch(loss, operands, weight, settings, reduction, dtype, by)
            )
        weights = weight, of_batch
        if of_batch is not None:
            check_memory(
                name, **{OF_BATCH: of_batch}, **({} if weight is None else {"weight": weight})
            )
            of_batch = spread_over(name, first, of_batch)
            weight = of_batch if weight is None else product(weight, of_batch)
        call, tensors = self.call(loss, operands, more, weight, settings, reduction, dtype)
        if asked:
            asked = asked._replace(warning=warning)
            if None not in weights:
                asked = asked._replace(make=with_product(name, asked.tensors, tensors))
            if not first.is_floating_point():
                asked = None  # the type of the losses may be torch's default, which may change
        try:
            result = dispatch(name, call, tensors, None, asked, by)
        except OutsideDomain:
            call.refuse(tensors)
        return result / first.shape[0] if by_batch and first.dim() else result

    def call(
        self,
        loss: Definition,
        operands: Tensors,
        further: Tensors,
        weight: Tensor | None,
        settings: dict[str, Any],
        reduction: str,
        dtype: torch.dtype,
    ) -> tuple[PointwiseCall, tuple[Tensor | None, ...]]:
        """What is run, and its tensors, all of floating point."""
        name, first = loss.name, next(iter(operands.values()))
        denominator, by_weights = None, False
        if weight is not None and self.weight is not None:
            weighed = self.weight.prepare(
                name, self.types.kernel, operands, weight, dtype, reduction
            )
            weight, dtype, by_weights = weighed
        if self.types.integers:
            _make_floating(name, self.types.kernel, operands, dtype)
        for argument, tensor in further.items():
            errors.expands(name, first.shape, **{argument: tensor})
            further[argument] = floating(name, first, **{argument: tensor})
        if reduction == "batchmean":
            reduction, denominator = ("mean", first.shape[0]) if first.dim() else ("sum", None)
        formula, numbers = self.chosen(loss, settings, further)
        dtype = result_dtype(dtype, first)
        ignored = settings.get("ignore_index")
        call = PointwiseCall(
            formula, numbers, reduction, denominator, dtype, by_weights, ignored, name
        )
        return call, (*operands.values(), *further.values(), weight)

    def by_torch(
        self,
        loss: Definition,
        operands: Tensors,
        weight: Tensor | None,
        settings: dict[str, Any],
        reduction: str,
        dtype: torch.dtype,
        by: Tensor | float | None,
    ) -> Tensor:
        """The formula's value of integers or complex numbers, for which there is no kernel."""
        check_memory(loss.name, **operands)
        trace.note(loss.name, None, f"the operands are of {dtype}")
        if dtype.is_complex:  # whose parts are wider than a half
            operands = {
                n: t if t.is_complex() else t.to(dtype.to_real()) for n, t in operands.items()
            }
        formula, numbers = self.chosen(loss, settings, {})
        named = dict(zip(formula.params, numbers, strict=True))
        values = list(operands.values())
        if self.shapes.warns:  # PyTorch broadcasts these first: one of no dimension keeps its type
            values = list(torch.broadcast_tensors(*values))
        try:
            losses = formula.value(*values, **named)
        except RuntimeError as error:
            for argument, tensor in operands.items():
                if tensor.dtype is torch.bool:
                    words = f"{argument} is of torch.bool: pass {argument}.float(): {error}"
                    errors.fail(RuntimeError, loss.name, words)
            raise
        if self.types.keeps:
            losses = losses.to(dtype)
        denominator: Tensor | float | None = None
        if weight is not None and self.weight is not None:
            kernel = self.types.kernel
            weight, _, by_weights = self.weight.prepare(
                loss.name, kernel, operands, weight, dtype, reduction
            )
            losses = losses * weight
            denominator = sum_of(weight) if by_weights else None
        if by is not None:
            denominator = by.to(exact_of(losses)) if isinstance(by, Tensor) else by
        exact = losses.is_floating_point() or losses.is_complex()
        if reduction == "mean" and denominator is None and not exact:
            first = next(iter(operands))
            words = (
                f"the losses are of {losses.dtype}, whose mean has no type: pass {first}.float(): mean(): "
                "could not infer output dtype. Input dtype must be either a floating point or complex dtype. "
                f"Got: {errors.scalar_type(losses.dtype)}"
            )
            errors.fail(RuntimeError, loss.name, words)
        result = total(losses, reduction, denominator)
        if denominator is None or reduction != "mean":
            return result
        return result.to(losses.dtype if exact else torch.get_default_dtype())

    def words(self, loss: Definition) -> docs.Words:
        unreduced = "the losses of all elements with 'none'"
        returns = f"A scalar, or {unreduced}, {self.types.returns} (float32 under autocast)."
        weight = [self.weight.raises] if self.weight and "weight" in loss.optional else []
        raises = [
            "ValueError: unknown `reduction`",
            self.shapes.raises,
            *weight,
            "RuntimeError: devices that differ",
            *self.types.raises,
            f"{self.no_tensor.__name__}: an argument that is no tensor",
        ]
        return docs.Words(returns, tuple(raises))


def spread_over(name: str, input: Tensor, of_batch: Tensor) -> Tensor:
    """A weight of the first dimensions, with the others of size 1."""
    own, shape = of_batch.shape, input.shape
    if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(own, shape, strict=False)):
        words = f"{OF_BATCH} of shape {list(own)} does not broadcast to the first dimensions of the input's"
        errors.fail(RuntimeError, name, f"{words} {list(shape)}")
    weight = floating(name, input, **{OF_BATCH: of_batch})
    return weight.reshape((*own, *(1,) * (len(shape) - len(own))))


def product(weight: Tensor, of_batch: Tensor) -> Tensor:
    if sharded.among((weight, of_batch)):
        weight, of_batch = sharded.alike(weight, of_batch)
    return of_batch.to(wide(weight, of_batch)) * weight


def with_product(
    name: str, given: tuple[Tensor, ...], made: tuple[Tensor | None, ...]
) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """How the kernel's tensors are made where the last two, a weight and one of the batch, are multiplied."""
    convert = conversion(given[:-2], made[:-1])

    def make(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        *operands, weight, of_batch = tensors
        kept = convert(tuple(operands)) if convert else operands
        return (*kept, product(weight, spread_over(name, tensors[0], of_batch)))

    return make


def _make_floating(name: str, kernel: str, operands: Tensors, dtype: torch.dtype) -> None:
    """Converts integer operands, in place, for losses of a type."""
    if len({t.dtype for t in operands.values()}) > 1:
        check_memory(name, **operands)
    if not dtype.is_floating_point:
        errors.not_floating(name, NotImplementedError, kernel, **operands)
    floats = [t.is_floating_point() for t in operands.values()]
    if not all(floats):
        # An integer tensor beside a floating one takes its type; the difference of two is exact.
        kind = dtype if any(floats) else torch.float64
        for argument, t in operands.items():
            operands[argument] = t if t.is_floating_point() else t.to(kind)
