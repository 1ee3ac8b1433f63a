"""The losses, one file a family: formula, documentation and definition of each."""

import importlib
import pkgutil
from typing import Any

from ..front.loss import FUNCTIONS

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
globals().update(FUNCTIONS)
__all__ = sorted(FUNCTIONS)


def __getattr__(name: str) -> Any:  # the losses' names come with their definitions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
