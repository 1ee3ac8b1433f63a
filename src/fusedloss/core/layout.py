"""Shapes and strides as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def coalesced(
    shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """As few dimensions as serve all arrays of this shape, in the order of the first one's memory."""
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    several = (d for d in range(len(shape)) if shape[d] != 1)
    for d in sorted(several, key=lambda d: -strides[0][d]):
        if sizes and all(k[-1] == row[d] * shape[d] for k, row in zip(kept, strides, strict=True)):
            sizes[-1] *= shape[d]
            for k, row in zip(kept, strides, strict=True):
                k[-1] = row[d]
        else:
            sizes.append(shape[d])
            for k, row in zip(kept, strides, strict=True):
                k.append(row[d])
    return sizes, kept


def empty_of_rows(tensor: Tensor) -> Tensor:
    """Memory for the gradient of a tensor (N, C, d1, ...); its dimensions d1, ... are always collapsible."""
    if tensor.dim() < 4:
        return torch.empty_like(tensor, requires_grad=False)
    return torch.empty_like(tensor.flatten(2), requires_grad=False).view(tensor.shape)
