"""What runs a call on a device: `cpu`, `gpu`, and `chunks` for heads whose logits never exist as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..kinds import Call
from . import gpu
from .gpu import interpreted

if TYPE_CHECKING:
    from .protocol import Engine

__all__ = ["engine_of", "interpreted"]


def engine_of(call: Call, tensor: Tensor | None) -> Engine[Any]:
    """What runs the call on the device of its first tensor."""
    if gpu.serves(tensor):
        return gpu.engine_of(call.family)
    from . import cpu  # with the first call that it runs

    return cpu.ENGINES[call.family]
