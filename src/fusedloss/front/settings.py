"""The words for what a loss's settings may be: each checks a value, says its rule, and what repeats a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import errors, torch_state

DENOMINATOR = "denominator"  # what 'mean' divides by, in place of a count of its own


@dataclass(repr=False, eq=False)
class Setting:
    """`check(function, argument, value)` gives the value that is meant, or raises."""

    check: Callable[[str, str, Any], Any]
    raises: str  # what the docstring says of it: "TypeError: {argument} that is no number"
    settled: str = ""  # a condition, in Python, without which a call is never repeated unchecked
    key: str = "{0}"  # what tells calls apart


def _ranged(
    holds: Callable[[float], bool], rule: str, kind: type[Exception], theirs: str
) -> Setting:
    def check(function: str, argument: str, value: Any) -> float:
        found = value if type(value) is float else errors.number(function, argument, value)
        if not holds(found):
            words = theirs.format(value=found) if theirs else f"got {found}"
            errors.fail(
                kind, function, f"{argument} must be {rule}{'. ' if theirs else ', '}{words}"
            )
        return found

    return Setting(check, f"{kind.__name__}: {{argument}} not {rule}")


def above(low: float, kind: type[Exception] = ValueError, theirs: str = "") -> Setting:
    """A number above `low`; `theirs` are PyTorch's own words for one that is not."""
    return _ranged(lambda v: v > low, f"greater than {low:g}", kind, theirs)


def at_least(low: float, kind: type[Exception] = ValueError, theirs: str = "") -> Setting:
    """A finite number, `low` or more."""
    return _ranged(lambda v: low <= v < math.inf, f"finite and at least {low:g}", kind, theirs)


def within(
    low: float, high: float, kind: type[Exception] = ValueError, theirs: str = ""
) -> Setting:
    """A number from `low` to `high`, both included."""
    return _ranged(lambda v: low <= v <= high, f"between {low} and {high}", kind, theirs)


def _integer(function: str, argument: str, value: Any) -> int:
    if type(value) is int and abs(value) < 2**63:
        return value
    return errors.integer(function, argument, value)


def one_of(*values: str) -> Setting:
    """One of these words."""

    def check(function: str, argument: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            expected = ", ".join(map(repr, values))
            errors.fail(
                ValueError, function, f"{argument} must be one of {expected}, got {value!r}"
            )
        return value

    return Setting(check, f"ValueError: {{argument}} that is none of {', '.join(values)}")


def _integer_or_none(function: str, argument: str, value: Any) -> int | None:
    return None if value is None else _integer(function, argument, value)


def _anything(function: str, argument: str, value: Any) -> Any:
    return value


def divisor(function: str, value: Any, reduction: str, **first: Tensor) -> Tensor | float | None:
    """What 'mean' shall divide by: a real number, or a 0-dim tensor of one; `first` is an operand.

    Raises:
        ValueError: the reduction is another one; a tensor of other than 0 dimensions.
        TypeError: no number, or a complex one.
        RuntimeError: a tensor that is neither on the CPU nor beside the operand.
    """
    if value is None:
        return None
    if reduction != "mean":
        words = f"{DENOMINATOR} is for reduction = 'mean', got {reduction!r}"
        errors.fail(ValueError, function, words)
    if not isinstance(value, Tensor):
        # torch.compile makes another graph for each number that is converted.
        traced = torch_state.is_compiling() and isinstance(value, int | float)
        return value if traced else errors.number(function, DENOMINATOR, value)
    if value.dim():
        words = f"{DENOMINATOR} must be a number or a 0-dim tensor, got {list(value.shape)}"
        errors.fail(ValueError, function, words)
    if value.is_complex():
        errors.fail(TypeError, function, f"{DENOMINATOR} must be real, got {value.dtype}")
    if not value.is_cpu:
        errors.same_device(function, **first, **{DENOMINATOR: value})
    return value


number = Setting(errors.number, "TypeError: {argument} that is no number")
positive = above(0)
boolean = Setting(
    errors.boolean, "TypeError: {argument} that is no bool", "({0} is True or {0} is False)"
)
integer = Setting(_integer, "TypeError: {argument} that is no integer", key="{0}, type({0})")
integer_or_none = Setting(
    _integer_or_none,
    "TypeError: {argument} that is neither an integer nor None",
    key="0 if {0} is None else {0}, type({0})",
)
class_group = Setting(  # the front checks it, once it knows the arguments of all processes
    _anything, "TypeError: {argument} that is no process group", "{0} is None", key="None"
)
# What a setting may be that has such a default, and of which no more is said.
BY_DEFAULT: dict[type, Setting] = {float: number, bool: boolean, int: integer}
