"""The record of the formula of a pointwise loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn


@dataclass(frozen=True)
class Pointwise:
    """A loss of one element: `value` and `grad`, written over the namespace `m` (see `names.py`).

    The positional parameters of `value` are the operands, its keyword-only ones are numbers.
    `grad` takes the same and gives the derivatives by the first two operands, as a pair.
    `domain`, where there is one, says whether operands lie where the loss is defined; `refuse` raises
    for a position and its first two operands that do not. With `linear`, the derivative by the first
    operand does not depend on it.
    `engines/cpu/printer.py` finds the calls of this class by name and prints the functions as C++.
    """

    value: Callable[..., Any]
    grad: Callable[..., Any]
    domain: Callable[..., Any] | None = None
    refuse: Callable[[str, float, float], NoReturn] | None = None
    linear: bool = False
    name: str = field(init=False)
    operands: tuple[str, ...] = field(init=False)
    params: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.value).parameters.values()
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        object.__setattr__(self, "name", self.value.__name__)
        object.__setattr__(
            self, "operands", tuple(p.name for p in parameters if p.kind is not keyword_only)
        )
        object.__setattr__(
            self, "params", tuple(p.name for p in parameters if p.kind is keyword_only)
        )
