"""Shapes, strides and memory as the Triton kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.layout import coalesced

Slot = Tensor | None


def common_shape(tensors: Sequence[Slot]) -> torch.Size:
    shapes = [t.shape for t in tensors if t is not None]
    same = all(shape == shapes[0] for shape in shapes)
    return shapes[0] if same else torch.broadcast_shapes(*shapes)


def empty_like(tensor: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """With the tensor's strides where it has the shape."""
    if tensor.shape == shape:
        return torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    return tensor.new_empty(shape, dtype=dtype, requires_grad=False)


def gradients(tensors: Sequence[Slot], needed: Sequence[bool], shape: torch.Size) -> list[Slot]:
    """Memory for those that are needed: None for each where nothing is."""
    wanted = needed or (False,) * len(tensors)
    pairs = zip(tensors, wanted, strict=False)
    return [empty_like(t, shape) if need and t is not None else None for t, need in pairs]


def merged(shape: torch.Size, tensors: Sequence[Slot]) -> tuple[list[int], list[tuple[int, ...]]]:
    """`coalesced`; the strides of a tensor whose elements lie one after the other are ()."""
    sizes, kept = coalesced(shape, [t.stride() for t in tensors if t is not None])
    dense = [1] * len(sizes)
    for d in range(len(sizes) - 1, 0, -1):
        dense[d - 1] = dense[d] * sizes[d]
    present = iter(kept)
    strides = [() if t is None else tuple(next(present)) for t in tensors]
    return sizes, [() if s == tuple(dense) else s for s in strides]
