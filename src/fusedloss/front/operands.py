"""What the operands of a loss of each element may be: their types and their shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import advice, errors
from ..core.reduce import promoted, result_dtype

Tensors = dict[str, Tensor]


@dataclass(repr=False, eq=False)
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
    keeps: bool = False  # whether the losses of integers are integers, whatever the formula gives


def promote(kernel: str, anything: bool = False) -> Types:
    """Operands of any types, and the result of the type that all promote to: floating point, or also others."""

    def check(name: str, operands: Tensors, weight: Tensor | None, shapes: Shapes) -> torch.dtype:
        more = {} if weight is None else {"weight": weight}
        errors.not_narrow(name, kernel, **operands, **more)
        if shapes.warns:  # what PyTorch expands first yields to none for having no dimension
            dtype, *others = (t.dtype for t in operands.values())
            for other in others:
                dtype = torch.promote_types(dtype, other)
        else:
            dtype = promoted(*operands.values())
        if dtype.is_complex and not anything:
            errors.not_floating(name, NotImplementedError, kernel, **operands)
        return dtype

    raises = (
        () if anything else ("NotImplementedError: no floating point tensor, or a complex one",)
    )
    return Types(check, "in the type that the operands promote to", raises, kernel, True, anything)


def promote_of_function(kernel: str, first: bool = False) -> Types:
    """The same of anything, where PyTorch takes a function of the input, which makes floats of integers.

    With `first` it does so before the input meets the target in another place.
    """
    promoting = promote(kernel, anything=True)

    def check(name: str, operands: Tensors, weight: Tensor | None, shapes: Shapes) -> torch.dtype:
        dtype = promoting.check(name, operands, weight, shapes)
        input, target = operands.values()
        if input.is_floating_point() or not dtype.is_floating_point:
            return dtype
        made = torch.get_default_dtype()
        if first and input.dim() and not target.dim():
            return made
        yields = target.dim() and not input.dim()
        return dtype if yields else torch.promote_types(dtype, made)

    return replace(promoting, check=check)


def promote_to_float(kernel: str) -> Types:
    """Real operands of any types; of integers alone, the result is of the default type."""
    promoting = promote(kernel, anything=True)

    def check(name: str, operands: Tensors, weight: Tensor | None, shapes: Shapes) -> torch.dtype:
        dtype = promoting.check(name, operands, weight, shapes)
        if dtype.is_complex:
            errors.not_floating(name, NotImplementedError, kernel, **operands)
        return dtype if dtype.is_floating_point else torch.get_default_dtype()

    raises = ("NotImplementedError: a complex tensor",)
    return Types(check, promoting.returns, raises, kernel, integers=True)


def of_input(kernel: str, mixed: bool = False) -> Types:
    """A real floating input, whose type is that of the result; a target of any real type.

    One of another type than the input learns, and is learned beside, only where types may be `mixed`.
    """

    def check(name: str, operands: Tensors, _weight: Tensor | None, _shapes: Shapes) -> torch.dtype:
        errors.not_narrow(name, kernel, **operands)
        input, target = operands.values()
        if not input.is_floating_point():
            casts = target.is_floating_point() and not input.is_complex()
            kind = RuntimeError if casts else NotImplementedError
            errors.not_floating(name, kind, kernel, advice.swapped(input, target), input=input)
        if target.is_complex():
            errors.not_floating(name, RuntimeError, kernel, target=target)
        learns = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
        if (
            not mixed
            and learns
            and result_dtype(target.dtype, target) != result_dtype(input.dtype, input)
        ):
            hint = f": pass {advice.cast('target', input.dtype)}"  # in PyTorch, backward refuses it
            words = f"Found dtype {target.dtype} but expected {input.dtype} for target{hint}"
            errors.fail(RuntimeError, name, words)
        return input.dtype

    more = "" if mixed else ", or where a gradient is wanted one of another type"
    raises = (
        "NotImplementedError: integer or complex input",
        f"RuntimeError: a complex target{more}",
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


@dataclass(repr=False, eq=False)
class Shapes:
    refused: str = ""  # words for shapes that differ; they broadcast where there are none
    warns: bool = False
    late: bool = False  # whether PyTorch looks at types first
    by_target: bool = False  # whether PyTorch's error tells of the target's shape first
    of_input: bool = False  # whether the others must broadcast to the input's
    of_one_rank: bool = False  # whether all must have as many dimensions

    def check(self, name: str, operands: Tensors) -> None:
        """Of shapes that differ."""
        if self.of_one_rank and len({t.dim() for t in operands.values()}) > 1:
            sizes = ", ".join(f"{n}: {t.size()}" for n, t in operands.items())
            words = f"{name} : All input tensors should have same dimension but got sizes: {sizes}"
            errors.fail(RuntimeError, name, words)
        if not self.refused:
            named = reversed(operands.items()) if self.by_target else operands.items()
            errors.broadcast(name, **dict(named))
            if self.of_input:
                (_, first), *others = operands.items()
                errors.expands(name, first.shape, **dict(others))
            return
        input, target = operands.values()
        words = self.refused.format(target=target.size(), input=input.size())
        errors.fail(ValueError, name, words + advice.like_input(input, target))

    @property
    def raises(self) -> str:
        if self.refused:
            return "ValueError: a target of another shape"
        if self.of_input:
            return "RuntimeError: a target that does not broadcast to the input's shape"
        if self.of_one_rank:
            return "RuntimeError: shapes that do not broadcast, or differ in how many dimensions there are"
        return "RuntimeError: shapes that do not broadcast"


broadcast = Shapes(late=True)
broadcast_target = Shapes(late=True, by_target=True)
broadcast_to_input = Shapes(of_input=True)
broadcast_of_one_rank = Shapes(of_one_rank=True)
warn = Shapes(warns=True)


def refuse(words: str) -> Shapes:
    """Shapes that differ are an error, in PyTorch's words."""
    return Shapes(refused=words)
