"""Losses of linear heads: what runs them, and runs them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kinds.distill import DistillCall
from ..route import class_groups
from ..route.entry import dispatch_head as dispatch
from ..route.memo import Asked
from .composed import Composed
from .loss import Definition
from .signature import Memo

# What they hold may change: no call with them is repeated.
OF_VALUES = ("denominator", "options", "class_group")


@dataclass(repr=False, eq=False)
class Heads(Composed):
    """The definition's function checks the arguments and makes the call ready."""

    def memo(self, loss: Definition) -> Memo:
        names = list(loss.signature.parameters)
        tensors = [n for n in DistillCall.arguments if n in names and n not in OF_VALUES]
        settings = [n for n in names if n not in tensors and n not in OF_VALUES]
        optional = [n for n in tensors if n in loss.optional]
        keys = [*(f"{n}, type({n})" for n in settings), *(f"{n} is None" for n in optional)]
        required = [n for n in tensors if n not in optional]
        absent = [f"{n} is None" for n in names if n in OF_VALUES]
        plain = " and ".join([*absent, *(f"{n} is not None" for n in required)])
        none = " and ".join(f"{n} is None" for n in optional) or "True"
        found = f"(({', '.join(required)}) if {none} else _present({', '.join(tensors)}))"
        return Memo(plain, ", ".join(keys), found, has_domain=False)

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Any:
        if given.get("class_group") is None:
            return dispatch(super().run(loss, asked, given), asked)

        def run() -> Any:
            own = class_groups.settle(loss.name, given, class_groups.of_heads)
            return dispatch(super(Heads, self).run(loss, None, own))

        return class_groups.untraced(run)
