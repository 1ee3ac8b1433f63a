"""What the formulas need to know of DTensors; nothing here imports torch.distributed, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import torch_state
from .errors import fail

T = TypeVar("T")


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


def beside(function: str, argument: str, scalar: Tensor, like: Tensor) -> Any:
    """A scalar as the tensor `like` can be combined with it: both DTensors, or none.

    Raises:
        RuntimeError: it is a DTensor beside a plain tensor, and only a collective would tell what it is.
    """
    if is_sharded(like):
        return scalar if is_sharded(scalar) else replicated(scalar, like)
    if not is_sharded(scalar):
        return scalar
    spread: Any = scalar
    if not all(p.is_replicate() for p in spread.placements):
        fail(
            RuntimeError,
            function,
            f"{argument} is a DTensor with placements {spread.placements} beside plain tensors: pass "
            f"{argument}.full_tensor(), which every process must call",
        )
    return spread.to_local()


def run(formula: Callable[..., T], tensors: tuple[Any, ...], first: int, last: int) -> T:
    """The formula of the tensors. Beside DTensors, plain ones from `first` to `last` are replicated."""
    like = next((t for t in tensors if t is not None and is_sharded(t)), None)
    if like is None:
        return formula(*tensors)
    tensors = tuple(
        t if t is None or is_sharded(t) or not first <= k < last else replicated(t, like)
        for k, t in enumerate(tensors)
    )
    if torch_state.is_compiling() or not (torch.is_inference_mode_enabled() or like.is_inference()):
        return formula(*tensors)
    # DTensors take aten.__and__ for an operation in place, by its name: a & b is a in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        return formula(*(t if t is None else t.clone() for t in tensors))


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
