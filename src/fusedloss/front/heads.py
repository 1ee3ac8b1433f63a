"""Losses of linear heads: what runs them, and runs them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..route.heads import dispatch
from ..route.memo import Asked
from .composed import Composed
from .loss import Definition


@dataclass(frozen=True)
class Heads(Composed):
    """The definition's function checks the arguments and makes the call ready."""

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Any:
        return dispatch(super().run(loss, asked, given))
