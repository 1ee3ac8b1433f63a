"""A sample that stands alone, as a batch of one."""

from __future__ import annotations

from torch import Tensor


def lifted(tensor: Tensor, alone: bool) -> Tensor:
    """A sample that stands alone as a batch of one.

    To torch.func a number times a 0-dim tensor is of float64, and an index of 0 dimensions is a number.
    """
    return tensor.unsqueeze(0) if alone else tensor


def lowered(result: Tensor, alone: bool) -> Tensor:
    return result.squeeze(0) if alone and result.dim() else result
