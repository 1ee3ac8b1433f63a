"""The checks of a loss of each element: types, shapes, weights, in the order in which PyTorch's are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import advice, errors, sharded, trace
from ..core.plain import check as check_memory
from ..core.reduce import promoted, result_dtype, sum_of, total
from ..kinds.formula import Pointwise
from ..kinds.pointwise import PointwiseCall
from ..kinds.torch_m import OutsideDomain
from ..route.dispatch import dispatch
from . import docs
from .loss import Definition
from .signature import Memo

Tensors = dict[str, Tensor]


class Reduction(NamedTuple):
    name: str
    remembered: bool = True  # whether the call may be repeated unchecked
    by_batch: bool = False  # whether the result is divided by the batch size once more


def plain_reduction(loss: Definition, given: dict[str, Any]) -> Reduction:
    return Reduction(loss.reduction(given))


# What the types of operands may be


@dataclass(frozen=True)
class Types:
    """`check` raises, or gives the type of the losses."""

    check: Callable[[str, Tensors, Tensor | None, Shapes], torch.dtype]
    returns: str
    raises: tuple[str, ...]
    kernel: str = ""  # PyTorch's word for what a type is lacking
    integers: bool = False  # whether some operands may be of integers
    anything: bool = (
        False  # whether torch's operations serve where none is floating point, or one complex
    )


def promote(kernel: str, anything: bool = False) -> Types:
    """Operands of any types, and the result of the type that all promote to: floating point, or also others."""

    def check(name: str, operands: Tensors, weight: Tensor | None, shapes: Shapes) -> torch.dtype:
        more = {} if weight is None else {"weight": weight}
        errors.not_narrow(name, kernel, **operands, **more)
        first, *others = operands.values()
        dtype = first.dtype
        for other in others:
            if (
                other.dtype != dtype
            ):  # what PyTorch expands first yields no more to others for having no dimension
                dtype = (
                    torch.promote_types(dtype, other.dtype)
                    if shapes.warns
                    else promoted(first, other)
                )
        if dtype.is_complex and not anything:
            errors.not_floating(name, NotImplementedError, kernel, **operands)
        return dtype

    raises = (
        () if anything else ("NotImplementedError: no floating point tensor, or a complex one",)
    )
    return Types(check, "in the type that the operands promote to", raises, kernel, True, anything)


def promote_of_function(kernel: str) -> Types:
    """The same of anything, where PyTorch takes a function of the input, which makes floats of integers."""
    promoting = promote(kernel, anything=True)

    def check(name: str, operands: Tensors, weight: Tensor | None, shapes: Shapes) -> torch.dtype:
        dtype = promoting.check(name, operands, weight, shapes)
        input, target = operands.values()
        if input.is_floating_point() or not dtype.is_floating_point:
            return dtype
        made = torch.get_default_dtype()
        yields = target.dim() and not input.dim()
        return dtype if yields else torch.promote_types(dtype, made)

    return dataclasses.replace(promoting, check=check)


def of_input(kernel: str) -> Types:
    """A real floating input, whose type is that of the result; a target of any real type, without gradients."""

    def check(name: str, operands: Tensors, _weight: Tensor | None, _shapes: Shapes) -> torch.dtype:
        errors.not_narrow(name, kernel, **operands)
        input, target = operands.values()
        if not input.is_floating_point():
            kind = RuntimeError if target.is_floating_point() else NotImplementedError
            errors.not_floating(name, kind, kernel, advice.swapped(input, target), input=input)
        if target.is_complex():
            errors.not_floating(name, RuntimeError, kernel, target=target)
        learns = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
        if learns and result_dtype(target.dtype, target) != result_dtype(input.dtype, input):
            hint = f": pass {advice.cast('target', input.dtype)}"  # in PyTorch, backward refuses it
            words = f"Found dtype {target.dtype} but expected {input.dtype} for target{hint}"
            errors.fail(RuntimeError, name, words)
        return input.dtype

    raises = (
        "NotImplementedError: integer or complex input",
        "RuntimeError: a complex target, or where a gradient is wanted one of another type",
    )
    return Types(check, "in the input's type", raises, kernel, integers=True)


def _same(name: str, operands: Tensors, _weight: Tensor | None, _shapes: Shapes) -> torch.dtype:
    errors.not_narrow(name, name, **operands)
    (_, first), *others = operands.items()
    dtype = result_dtype(first.dtype, first)
    for other_name, other in others:
        if other.dtype != first.dtype and result_dtype(other.dtype, other) is not dtype:
            hint = advice.swapped(first, other) or f": pass {advice.cast(other_name, first.dtype)}"
            words = f"Found dtype {other.dtype} but expected {first.dtype} for {other_name}{hint}"
            errors.fail(RuntimeError, name, words)
    if not all(t.is_floating_point() for t in operands.values()):
        errors.not_floating(name, NotImplementedError, name, **operands)
    return first.dtype


same = Types(
    _same,
    "in the input's type",
    ("RuntimeError: types that differ", "NotImplementedError: integer or complex tensors"),
)


# What the shapes of operands may be


@dataclass(frozen=True)
class Shapes:
    refused: str = ""  # words for shapes that differ; they broadcast where there are none
    warns: bool = False
    late: bool = False  # whether PyTorch looks at types first
    by_target: bool = False  # whether PyTorch's error tells of the target's shape first

    def check(self, name: str, operands: Tensors) -> None:
        """Of shapes that differ."""
        if not self.refused:
            named = reversed(operands.items()) if self.by_target else operands.items()
            errors.broadcast(name, **dict(named))
            return
        input, target = operands.values()
        words = self.refused.format(target=target.size(), input=input.size())
        errors.fail(ValueError, name, words + advice.like_input(input, target))

    @property
    def raises(self) -> str:
        if self.refused:
            return "ValueError: a target of another shape"
        return "RuntimeError: shapes that do not broadcast"


broadcast = Shapes(late=True)
broadcast_target = Shapes(late=True, by_target=True)
warn = Shapes(warns=True)


def refuse(words: str) -> Shapes:
    """Shapes that differ are an error, in PyTorch's words."""
    return Shapes(refused=words)


# What a weight may be


class Weighed(NamedTuple):
    weight: Tensor
    dtype: torch.dtype
    by_weights: bool = False  # 'mean' divides by their sum


@dataclass(frozen=True)
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
        # A 0-dim one yields to the losses' type, but not to that of their sum.
        if reduction == "mean" or weight.dim() or not (target.dim() and dtype.is_floating_point):
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


@dataclass(frozen=True)
class Elements:
    """The operands have one shape, or broadcast; the definition's function chooses the formula."""

    kind: ClassVar[str] = "pointwise"
    computes: ClassVar[bool] = False

    types: Types
    shapes: Shapes = warn
    weight: Weight | None = None
    no_tensor: type[Exception] = AttributeError
    reduction: Callable[[Definition, dict[str, Any]], Reduction] = plain_reduction

    def memo(self, loss: Definition) -> Memo:
        defaults = {n: p.default for n, p in loss.signature.parameters.items()}
        formula, _ = self.chosen(loss, {n: defaults[n] for n in loss.settings}, {})
        return loss.memo(True, formula.domain is not None)

    def chosen(
        self, loss: Definition, settings: dict[str, Any], further: Tensors
    ) -> tuple[Pointwise, tuple[float, ...]]:
        """The formula and its numbers, by the settings and the further operands that there are."""
        found = loss.body(**settings, **{n: further.get(n) for n in loss.further})
        return (found, ()) if isinstance(found, Pointwise) else found

    def run(self, loss: Definition, memo: tuple[Any, ...] | None, given: dict[str, Any]) -> Tensor:
        name = loss.name
        operands = loss.tensors(given, self.no_tensor)
        more = loss.more_tensors(given, self.weight.no_tensor if self.weight else self.no_tensor)
        settings = loss.checked(given)
        reduction, remembered, by_batch = self.reduction(loss, given)
        first, *others = operands.values()
        differ = any(t.shape != first.shape for t in others)
        if differ and not self.shapes.late:
            self.shapes.check(name, operands)
        if more or any(t.device != first.device for t in others):
            errors.same_device(name, **operands, **more)
        weight = more.pop("weight", None)
        dtype = self.types.check(name, operands, weight, self.shapes)
        if differ and self.shapes.late:
            self.shapes.check(name, operands)
        loss.refuse_what_users_rue(operands, reduction=reduction, **settings)
        if differ and self.shapes.warns:
            errors.warn_broadcast(name, first, others[0])
        if (differ and self.shapes.warns) or not remembered:
            memo = None  # to warn again
        if self.types.anything and not dtype.is_floating_point:
            return self.by_torch(loss, operands, weight, settings, reduction, dtype)
        given_tensors = (*operands.values(), *more.values(), weight)
        call, tensors = self.call(loss, operands, more, weight, settings, reduction, dtype)
        if any(t is not u for t, u in zip(tensors, given_tensors, strict=True)):
            memo = None  # what is repeated gets the tensors as they are given
        try:
            result = dispatch(name, call, tensors, settings=memo)
        except OutsideDomain:
            refuse_first(call, *tensors[:2])
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
        call = PointwiseCall(formula, numbers, reduction, denominator, dtype, by_weights)
        return call, (*operands.values(), *further.values(), weight)

    def by_torch(
        self,
        loss: Definition,
        operands: Tensors,
        weight: Tensor | None,
        settings: dict[str, Any],
        reduction: str,
        dtype: torch.dtype,
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
        losses = formula.value(*operands.values(), **named)
        denominator = None
        if weight is not None and self.weight is not None:
            kernel = self.types.kernel
            weight, _, by_weights = self.weight.prepare(
                loss.name, kernel, operands, weight, dtype, reduction
            )
            losses = losses * weight
            denominator = sum_of(weight) if by_weights else None
        result = total(losses, reduction, denominator)
        if denominator is None or reduction != "mean":
            return result
        exact = losses.is_floating_point() or losses.is_complex()
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


def refuse_first(call: PointwiseCall, *tensors: Tensor | None) -> NoReturn:
    """Tells of the first element outside of the formula's domain."""
    first, second = map(sharded.whole, tensors)
    formula = call.formula
    assert formula.domain is not None and formula.refuse is not None
    at = int((~formula.domain(first, second)).flatten().nonzero()[0])
    x, t = (tensor.flatten()[at].item() for tensor in (first, second))
    formula.refuse(errors.position(at, first.shape), x, t)
