"""What the formulas need to know of DTensors; nothing here imports torch.distributed, which takes seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Any:
    """The tensor itself on every process, to look at; collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def replicated(tensor: Tensor, like: Any) -> Tensor:
    """A plain tensor that every process holds alike, on the mesh of the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(tensor, like.device_mesh, placements, run_check=False)


def beside(tensors: tuple[Any, ...], first: int) -> tuple[Any, ...]:
    """Beside a DTensor, the plain tensors from `first` on (class indices, weights) replicated on its mesh."""
    like = next((t for t in tensors if t is not None and is_sharded(t)), None)
    if like is None:
        return tensors
    return tuple(
        t if k < first or t is None or is_sharded(t) else replicated(t, like)
        for k, t in enumerate(tensors)
    )


def log_softmax(x: Tensor, axis: int) -> Tensor:
    """As torch's, whose derivative under `loss_parallel()` is that of cross entropy alone."""
    if not x.shape[axis]:
        return x
    x = x - x.amax(axis, keepdim=True).detach()
    return x - x.exp().sum(axis, keepdim=True).log()


def chosen(x: Tensor, index: Tensor) -> Tensor:
    """`x.gather(1, index)`, which takes no sharded classes: its mask does not survive the next operation."""
    classes = torch.arange(x.shape[1], device=x.device).reshape(1, -1, *(1,) * (x.dim() - 2))
    return torch.where(replicated(classes, x) == index, x, 0).sum(1, keepdim=True)
