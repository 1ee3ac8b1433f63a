"""DTensors: how they are told, and made. Nothing here imports torch.distributed unasked: it takes seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import fail
from .plain import PLAIN


def is_sharded(tensor: Any) -> bool:
    return (
        type(tensor) not in PLAIN
        and isinstance(tensor, Tensor)  # proxies have every attribute
        and hasattr(tensor, "device_mesh")
    )


def among(tensors: Iterable[Any]) -> bool:
    return any(t is not None and is_sharded(t) for t in tensors)


def whole(tensor: Any) -> Any:
    """The tensor itself on every process, to look at; collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def placed(
    local: Tensor, mesh: Any, placements: Sequence[Any], shape: torch.Size | None = None
) -> Tensor:
    """The DTensor of which this process has `local`; shards may be uneven, and do not tell its shape."""
    from torch.distributed.tensor import DTensor

    if shape is None:
        return DTensor.from_local(local, mesh, placements, run_check=False)
    stride = tuple(max(1, shape[k + 1 :].numel()) for k in range(len(shape)))
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
    )


def everywhere(mesh: Any) -> list[Any]:
    """The placements of what every process of a mesh holds alike."""
    from torch.distributed.tensor import Replicate

    return [Replicate()] * mesh.ndim


def replicated(tensor: Tensor, like: Any) -> Tensor:
    """Held alike by every process of the mesh of `like`, as a plain tensor already is."""
    mesh = like.device_mesh
    if is_sharded(tensor):
        found: Tensor = tensor.redistribute(mesh, everywhere(mesh))  # type: ignore[attr-defined]
        return found
    return placed(tensor, mesh, everywhere(mesh))


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


def alike(*tensors: Tensor) -> list[Tensor]:
    """All of them DTensors, the plain ones as replicated."""
    like = next(t for t in tensors if is_sharded(t))
    return [t if is_sharded(t) else replicated(t, like) for t in tensors]


def note(given: Mapping[str, Any]) -> str:
    """What to say of plain tensors beside DTensors where their shapes do not fit."""
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    placed = [name for name, t in tensors.items() if is_sharded(t)]
    plain = [name for name in tensors if name not in placed]
    if not (placed and plain):
        return ""
    first, like = plain[0], placed[0]
    return (
        f" ({first} is a plain tensor beside the DTensor {like}, and counts as held in full by every process: "
        f"a shard becomes a DTensor by DTensor.from_local({first}, {like}.device_mesh, placements))"
    )


@contextlib.contextmanager
def noted(given: Mapping[str, Any]) -> Iterator[None]:
    """Errors inside say so, too."""
    try:
        yield
    except (IndexError, RuntimeError, ValueError) as error:
        error.args = (f"{error}{note(given)}",)
        raise


def settled(result: Any) -> Any:
    """A result of torch's operations, of which each process may hold a part, as a whole; others as they are."""
    return replicated(result, result) if is_sharded(result) else result
