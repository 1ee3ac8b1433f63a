"""Shapes, strides and memory as the Triton kernels take them."""

from __future__ import annotations

import torch

from ...core.layout import coalesced
from ..plan import Slots


def merged(shape: torch.Size, tensors: Slots) -> tuple[list[int], list[tuple[int, ...]]]:
    """`coalesced`; the strides of a tensor whose elements lie one after the other are ()."""
    sizes, kept = coalesced(shape, [t.stride() for t in tensors if t is not None])
    dense = [1] * len(sizes)
    for d in range(len(sizes) - 1, 0, -1):
        dense[d - 1] = dense[d] * sizes[d]
    present = iter(kept)
    strides = [() if t is None else tuple(next(present)) for t in tensors]
    return sizes, [() if s == tuple(dense) else s for s in strides]
