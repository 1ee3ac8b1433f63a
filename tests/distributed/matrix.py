"""Cells of the matrix: a loss of DTensors on several processes is that of the whole tensors on one."""

from __future__ import annotations

import functools
import traceback
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from fusedloss.front.definition import REGISTRY, Loss

CLASSES, PLACES = 7, 5
# By dimension of the mesh: along what the input is divided.
LAYOUTS = ("rows", "classes", "alike", "partial")
LAYOUTS_2D = ("rows alike", "alike classes", "rows classes", "rows rows")
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def sizes(world: int) -> dict[str, int]:
    """Rows that all processes have as many of, that they have not, and that some have none of."""
    return {"even": 4 * world, "uneven": 4 * world + 1, "empty": 1}


def shape_of(loss: Loss, rows: int) -> tuple[int, ...]:
    return (rows, CLASSES, PLACES) if loss.kind == "dice" else (rows, CLASSES)


@functools.cache
def mesh_of(layout: str) -> Any:
    world, dims = dist.get_world_size(), len(layout.split())
    two = (1, world) if world % 2 else (world // 2, 2)
    return init_device_mesh("cpu", (world,) if dims == 1 else two)


def placement(loss: Loss, k: int, tensor: Tensor, first: Tensor, word: str) -> Placement:
    """Of argument k, along one dimension of the mesh; an option's k is -1."""
    sequences = loss.kind == "sequences"
    if k == 0:
        dims = {"rows": int(sequences), "classes": 1 + int(sequences)}
        return (
            Partial() if word == "partial" else Shard(dims[word]) if word in dims else Replicate()
        )
    if k in loss.whole:
        return Shard(0) if word == "classes" else Replicate()
    if word == "classes" and tensor.shape == first.shape:
        return Shard(1)
    rows = first.shape[1 if sequences else 0]
    return Shard(0) if word == "rows" and tensor.shape[:1] == (rows,) else Replicate()


def placed(tensor: Tensor, mesh: Any, placements: Sequence[Placement]) -> DTensor:
    if not any(p.is_partial() for p in placements):
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return DTensor.from_local(tensor / mesh.size(), mesh, placements)


def given(
    loss: Loss, tensors: Sequence[Any], options: dict[str, Any], layout: str, mesh: Any, plain: bool
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as DTensors; what counts for all rows may be plain."""
    words = layout.split()

    def on_mesh(k: int, t: Tensor) -> DTensor:
        placements = [placement(loss, k, t, tensors[0], word) for word in words]
        return placed(t.detach(), mesh, placements).requires_grad_(t.requires_grad)

    def option(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        of_all = value.dim() == 1 and value.shape[:1] != tensors[0].shape[:1]
        return value if plain and of_all and name != "linear_bias" else on_mesh(-1, value)

    # Labels in one row are of all sequences.
    in_one_row = loss.kind == "sequences" and tensors[1].dim() == 1
    found = [
        placed(t, mesh, [Replicate()] * mesh.ndim) if in_one_row and k == 1 else on_mesh(k, t)
        for k, t in enumerate(tensors)
    ]
    return found, {name: option(name, value) for name, value in options.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(key: str, option: str, reduction: str, rows: int, layout: str, plain: bool) -> None:
    loss, mesh = REGISTRY[key], mesh_of(layout)
    generator = Generator().manual_seed(zlib.crc32(f"{key} {option} {rows}".encode()))
    tensors = loss.example(shape_of(loss, rows), torch.float64, generator)
    options = loss.options[option](tensors, generator)
    tensors = tuple(
        t.detach().requires_grad_(k in loss.differentiable) for k, t in enumerate(tensors)
    )
    for name in loss.learned:
        if name in options:
            options[name] = options[name].detach().requires_grad_()
    options["reduction"] = reduction
    many = given(loss, tensors, options, layout, mesh, plain)
    # A distance of the user's own is torch's to differentiate.
    agree(loss.reduced, (tensors, options), many, places="lambda" not in option)


def agree(
    function: Callable[..., Tensor],
    one: tuple[Sequence[Any], dict[str, Any]],
    many: tuple[Sequence[Any], dict[str, Any]],
    places: bool = True,
) -> None:
    """The value and all gradients of both are the same; what is reduced all processes hold alike.

    `places`: the gradients are where the tensors are. Later calls, by a shorter way, give the same bits.
    """
    expected, value = function(*one[0], **one[1]), function(*many[0], **many[1])
    torch.testing.assert_close(whole(value), expected, equal_nan=True, **EXACT)
    if not expected.dim():
        torch.testing.assert_close(value.item(), expected.item(), equal_nan=True, **EXACT)
        assert all(p.is_replicate() for p in value.placements), value.placements
    learned = [
        (a, b)
        for a, b in zip((*one[0], *one[1].values()), (*many[0], *many[1].values()), strict=True)
        if isinstance(a, Tensor) and a.requires_grad
    ]
    incoming = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64)
    incoming = incoming.reshape(expected.shape).to(expected)
    arrives = placed(incoming, value.device_mesh, value.placements)
    wanted = torch.autograd.grad(expected, [a for a, _ in learned], incoming)
    found = torch.autograd.grad(value, [b for _, b in learned], arrives)
    for _ in range(2):
        again = function(*many[0], **many[1])
        grads = torch.autograd.grad(again, [b for _, b in learned], arrives)
        for first, later in zip((value, *found), (again, *grads), strict=True):
            same_bits(first, later)
    for (_, b), g, w in zip(learned, found, wanted, strict=True):
        torch.testing.assert_close(whole(g), w, equal_nan=True, **EXACT)
        if isinstance(b, DTensor) and places:
            own = [Replicate() if p.is_partial() else p for p in b.placements]
            assert list(g.placements) == own, f"a gradient on {g.placements} of {b.placements}"


def same_bits(first: Tensor, later: Tensor) -> None:
    assert type(first) is type(later)
    if isinstance(first, DTensor) and isinstance(later, DTensor):
        assert (first.device_mesh, first.placements) == (later.device_mesh, later.placements)
        assert (first.shape, first.dtype) == (later.shape, later.dtype)
        first, later = first.to_local(), later.to_local()
    torch.testing.assert_close(later, first, rtol=0, atol=0, equal_nan=True)


def cells(key: str, option: str, layout: str, world: int) -> list[tuple[Any, ...]]:
    """Of one loss, option set and layout."""
    loss = REGISTRY[key]
    rows = {n: s for n, s in sizes(world).items() if not (n == "empty" and "partial" in layout)}
    return [
        (key, option, reduction, n, layout, name == "uneven")
        for reduction in loss.reductions or ("none",)
        for name, n in rows.items()
    ]


def check_all(rank: int, cells: Sequence[tuple[Any, ...]]) -> dict[str, str]:
    """What went wrong, by cell."""
    wrong = {}
    for cell in cells:
        try:
            check(*cell)
        except Exception:
            wrong[", ".join(map(str, cell))] = traceback.format_exc()
    return wrong
