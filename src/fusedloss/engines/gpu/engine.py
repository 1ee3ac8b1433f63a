"""What the engines of a GPU share, and the engine of each family of calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...kinds import Call
from ..plan import Slot, Slots
from ..protocol import Engine, P
from . import again, flags


class GpuEngine(Engine[P]):
    def forward(
        self, call: Call, tensors: Slots, needed: Sequence[bool]
    ) -> tuple[Tensor, list[Slot]]:
        device = tensors[0].device  # type: ignore[union-attr]
        flags.raise_pending(device)
        found = super().forward(call, tensors, needed)
        flags.raise_if_eager(device)
        return found

    def backward(
        self, call: Call, tensors: Slots, needed: Sequence[bool], incoming: Tensor
    ) -> list[Slot]:
        flags.raise_pending(incoming.device)
        return super().backward(call, tensors, needed, incoming)

    def rescale(self, call: Call, tensors: Slots, stored: Slots, incoming: Tensor) -> None:
        flags.raise_pending(incoming.device)
        super().rescale(call, tensors, stored, incoming)

    def prepare(
        self, call: Call, tensors: tuple[Slot, ...], needed: Sequence[bool], stores: bool
    ) -> Any:
        return again.prepare(self, call, tensors, needed, stores)
