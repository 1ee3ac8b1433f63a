"""A loss whose function is the composition itself: of other losses, or of what no kernel of ours knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..route.memo import Asked
from . import docs
from .loss import Definition
from .signature import Memo


@dataclass(repr=False, eq=False)
class Composed:
    """The definition's function takes the arguments that it names, and computes the loss."""

    kind: ClassVar[str] = ""
    computes: ClassVar[bool] = True
    divides: ClassVar[bool] = False  # what does so says it itself

    returns: str
    raises: tuple[str, ...] = ()
    check: Callable[..., None] | None = None  # of all arguments, before the function

    def memo(self, loss: Definition) -> Memo | None:
        """It is never repeated unchecked."""

    def run(self, loss: Definition, asked: Asked | None, given: dict[str, Any]) -> Any:
        loss.tensors(given, TypeError)
        if self.check:
            self.check(loss.name, **given)
        return loss.body(**{**given, **loss.checked(given)})

    def words(self, loss: Definition) -> docs.Words:
        return docs.Words(
            f"A scalar, or the losses of all rows with 'none', {self.returns}.", self.raises
        )
