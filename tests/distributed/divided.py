"""Means of DTensors over a denominator: a number, a tensor, or a DTensor; test_divided.py runs these."""

from __future__ import annotations

import inspect
import traceback
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh

from distributed import matrix
from fusedloss import functional as F  # noqa: N812
from fusedloss.distributed import count
from fusedloss.front.definition import REGISTRY

N = 7
LAYOUTS = ("rows", "classes", "alike")


def denominators(mesh: Any) -> dict[str, Any]:
    number = torch.tensor(N, dtype=torch.float64)
    everywhere = [Replicate()] * mesh.ndim
    return {
        "number": N,
        "tensor": torch.tensor(N),
        "alike": DTensor.from_local(number, mesh, everywhere),
        "integer alike": DTensor.from_local(torch.tensor(N), mesh, everywhere),
        "pending": DTensor.from_local(number / mesh.size(), mesh, [Partial()] * mesh.ndim),
    }


def check_all(rank: int, layout: str) -> dict[str, str]:
    """What went wrong, by loss and denominator."""
    mesh, wrong = matrix.mesh_of(layout), {}
    for key, loss in REGISTRY.items():
        if "denominator" not in inspect.signature(loss.function).parameters:
            continue
        generator = Generator().manual_seed(zlib.crc32(key.encode()))
        drawn = loss.example(matrix.shape_of(loss, 5), torch.float64, generator)
        tensors = tuple(
            t.detach().requires_grad_(k in loss.differentiable) for k, t in enumerate(drawn)
        )
        options = loss.options[next(iter(loss.options))](tensors, generator)
        many = matrix.given(loss, tensors, options, layout, mesh, plain=False)
        for name, denominator in denominators(mesh).items():
            given = many[0], {**many[1], "denominator": denominator}
            try:
                matrix.agree(loss.function, (tensors, {**options, "denominator": N}), given)
            except Exception:
                wrong[f"{key}, {name}"] = traceback.format_exc()
    return wrong


def beside_plain_tensors(rank: int) -> dict[str, Any]:
    """What a loss of plain tensors makes of a DTensor: it speaks to nobody."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, y, head = torch.eye(3, 4), torch.arange(3), torch.ones(4, 4)
    found: dict[str, Any] = {}
    for name, denominator in denominators(mesh).items():
        for loss in (
            lambda n: F.cross_entropy(x, y, denominator=n),
            lambda n: F.linear_cross_entropy(x, head, y, denominator=n),
        ):
            try:
                value: Tensor = loss(denominator)  # type: ignore[no-untyped-call]
                told: Any = value.item()
            except RuntimeError as error:
                told = str(error)
            found.setdefault(name, []).append(told)
    return found


def counted(rank: int) -> float:
    """The count of sharded targets is what their own mean divides by."""
    mesh = matrix.mesh_of("rows")
    x = torch.randn(5, 4, dtype=torch.float64, generator=Generator().manual_seed(0))
    y = torch.tensor([0, -100, 3, -100, 1])
    rows, labels = (matrix.placed(t, mesh, [matrix.Shard(0)]) for t in (x, y))
    mean = F.cross_entropy(rows, labels, denominator=count(labels))
    return mean.item() - torch.nn.functional.cross_entropy(x, y).item()


def of_shards_of_classes(rank: int) -> list[float]:
    """How far `class_group` and a denominator are from one process."""
    x = torch.randn(5, 7, dtype=torch.float64, generator=Generator().manual_seed(0))
    y = torch.tensor([0, -100, 3, 6, 1])
    total = torch.nn.functional.cross_entropy(x, y, reduction="sum").item()
    own = x.tensor_split(dist.get_world_size(), 1)[rank]
    return [
        F.cross_entropy(own, y, class_group=dist.group.WORLD, denominator=n).item() - total / N
        for n in (N, torch.tensor(N), torch.tensor(float(N)))
    ]
