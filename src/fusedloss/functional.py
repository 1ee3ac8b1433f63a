"""The loss functions under the names of `torch.nn.functional`, and beside them everything else in it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional

from . import aliases
from .losses import *  # noqa: F403
from .losses import __all__ as _own


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return aliases.public(torch.nn.functional, _own)
    try:
        return getattr(torch.nn.functional, name)
    except AttributeError:
        raise AttributeError(f"module 'fusedloss.functional' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional)})
