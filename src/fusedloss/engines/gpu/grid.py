"""The tensors of the row losses as their kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import RowsPlan, Slot, class_strides, flat, value_strides
from .labels import OutOfRange


class Grid(RowsPlan):
    """Tensors as (n, c, d), and (N, C, 1) as (1, C, N), for the programs to be full."""

    def spread(self) -> None:
        super().spread()
        n, self.c, d = self.sizes()
        self.alone = self.x.dim() == 3 and d == 1
        self.n, self.d = (1, n) if self.alone else (n, d)

    @property
    def positions(self) -> int:
        return self.n * self.d

    def gradient(self, tensor: Tensor) -> Tensor:
        # The kernel of nll writes the target's entry alone.
        memory = super().gradient(tensor)
        return memory.zero_() if self.call.loss == "nll_loss" else memory

    def classes(self, tensor: Slot) -> tuple[int, int, int]:
        """The strides of a tensor with a class dimension."""
        if tensor is None:
            return 0, 0, 0
        n, c, d = class_strides(flat(tensor, 2))
        return (0, c, n) if self.alone else (n, c, d)

    def values(self, tensor: Slot) -> tuple[int, int]:
        """The same of a tensor with one value a row, or one for all of them."""
        if tensor is None:
            return 0, 0
        n, _, d = value_strides(tensor)
        return (0, n) if self.alone and tensor.dim() == 2 else (n, d)

    def record(self) -> OutOfRange | None:
        call, target = self.call, self.tensors[1]
        if call.probabilities or target is None:
            return None
        unsigned = target.dtype is torch.uint64
        return OutOfRange(call.loss, target.shape, self.c, call.ignore_index, unsigned)
