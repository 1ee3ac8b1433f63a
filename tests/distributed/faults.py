"""What is refused, on every process alike; and the collectives of a loss; test_faults.py runs these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from distributed import matrix
from distributed.uses import ALL, ROWS, P, V, X, Y, on_mesh
from fusedloss import functional as F  # noqa: N812
from fusedloss.front.definition import REGISTRY


def refused(call: Callable[[], Any]) -> str:
    """What is said."""
    try:
        call()
    except (IndexError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("not refused")


def labels(rank: int, key: str, reduction: str) -> tuple[str, str]:
    """What one process says of a label out of range in the last row, and what this one of the DTensor."""
    loss, rows = REGISTRY[key], 5
    generator = Generator().manual_seed(0)
    tensors = list(loss.example(matrix.shape_of(loss, rows), torch.float64, generator))
    assert loss.indices is not None
    y = tensors[loss.indices].clone()
    y.reshape(rows, -1)[-1, 0] = 77
    tensors[loss.indices] = y
    options: dict[str, Any] = {"reduction": reduction} if loss.reductions else {}
    places, _ = matrix.given(loss, tensors, {}, "rows", matrix.mesh_of("rows"), True)
    for k in loss.differentiable:
        places[k].requires_grad_(k % 2 == rank)  # no matter who learns
    return (
        refused(lambda: loss.function(*tensors, **options)),
        refused(lambda: loss.function(*places, **options)),
    )


def mixtures(rank: int) -> list[str]:
    """Tensors that do not go together, and what does not fit."""
    other = init_device_mesh("cpu", (dist.get_world_size(), 1))
    local = X[2 * rank : 2 * rank + 2]
    calls: list[Callable[[], Any]] = [
        lambda: F.mse_loss(on_mesh(X, ROWS), P),
        lambda: F.mse_loss(P, on_mesh(X, ROWS)),
        lambda: F.cross_entropy(on_mesh(X, ROWS), X.softmax(1)),
        lambda: F.cross_entropy(on_mesh(X[:4], ROWS), Y[2 * rank : 2 * rank + 2]),
        lambda: F.cross_entropy(on_mesh(X, ROWS), matrix.placed(Y, other, [ROWS, ALL])),
        lambda: F.linear_cross_entropy(local, on_mesh(V, ROWS), Y[:2]),
        lambda: F.binary_cross_entropy(on_mesh(P + (rank == 1), ROWS), on_mesh(P, ROWS)),
        lambda: F.binary_cross_entropy(
            on_mesh(torch.where(torch.arange(35).reshape(5, 7) == 30, 1.5, P), ROWS),
            on_mesh(P, ROWS),
            reduction="none",
        ),
    ]
    return [refused(call) for call in calls]


def one_fails(rank: int) -> str:
    """Who meets another error tells it: the others do not wait."""
    from fusedloss.route import shards

    def compute(call: Any, tensors: Any, shard: Any) -> tuple[Tensor]:
        if rank == 1:
            raise RuntimeError("no memory")
        return (torch.zeros((), dtype=call.dtype),)

    from unittest import mock

    run = shards.run

    def failing(loss: str, call: Any, tensors: Any, _: Any, *more: Any) -> Any:
        return run(loss, call, tensors, compute, *more)

    with mock.patch.object(shards, "run", failing):
        return refused(lambda: F.mse_loss(on_mesh(X, ROWS), on_mesh(P, ROWS)))


class Collectives(TorchDispatchMode):
    """The names of those that are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(t, DTensor) for t in args):
            return NotImplemented  # seen again as what it is made of
        if "c10d" in func.namespace and "wait_tensor" not in str(func):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def sequence(rank: int) -> dict[str, list[str]]:
    """The collectives of each loss, forward and backward; whether a process learns differs."""
    found = {}
    for learns in (False, True):
        for key, loss in REGISTRY.items():
            generator = Generator().manual_seed(rank)  # other values on each
            tensors = loss.example(matrix.shape_of(loss, 4), torch.float64, generator)
            mesh = matrix.mesh_of("rows")
            places, _ = matrix.given(loss, tensors, {}, "rows", mesh, True)
            for k in loss.differentiable:
                places[k].requires_grad_(learns and rank == 0)
            for reduction in loss.reductions or ("none",):
                with Collectives() as mode:
                    loss.reduced(*places, reduction=reduction)
                found[f"{key}, {reduction}, {learns}"] = mode.seen
    return found


def kernels(rank: int) -> dict[str, str | None]:
    """By loss, that of row-sharded tensors."""
    found = {}
    for key, loss in REGISTRY.items():
        tensors = loss.example(matrix.shape_of(loss, 5), torch.float64, Generator().manual_seed(0))
        places, _ = matrix.given(loss, tensors, {}, "rows", matrix.mesh_of("rows"), True)
        for k in loss.differentiable:
            places[k].requires_grad_()
        found[key] = fusedloss.explain(loss.function, *places).kernel
    return found


def same_bits(rank: int) -> list[int]:
    """Of each loss, in float32."""
    found = []
    for loss in REGISTRY.values():
        tensors = loss.example(matrix.shape_of(loss, 9), torch.float32, Generator().manual_seed(0))
        for layout in ("rows", "classes"):
            places, _ = matrix.given(loss, tensors, {}, layout, matrix.mesh_of(layout), True)
            for reduction in set(loss.reductions) - {"none"}:
                value = loss.reduced(*places, reduction=reduction)
                found.append(value.to_local().view(torch.int32).item())
    return found
