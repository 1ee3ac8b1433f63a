"""Cross entropy of logits of which a process has a shard of the classes: a head whose logits are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .heads import LinearCall, Slot


@dataclass(slots=True, repr=False, eq=False)
class LogitsCall(LinearCall):
    """The input holds this process's logits (N, C); linear_weight (C, 1, 0) says how many classes these are."""

    family: ClassVar[str] = "logits"

    def logits_of(self, input: Tensor, linear_weight: Tensor, linear_bias: Slot) -> Tensor:
        assert self.shard is not None
        return self.shard.whole(input, 1).unsqueeze(2)
