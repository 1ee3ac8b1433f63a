"""`fusedloss.distributed.count`: of steps, of groups and meshes, of DTensors; the same on all processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import ranks
from fusedloss import functional as F  # noqa: N812
from fusedloss.distributed import count

TARGET = torch.tensor([[0, -100, 2], [3, -100, 1]])
WEIGHT = torch.tensor([0.5, 0.25, 0.125, 4.0], dtype=torch.float64)


def test_of_one_process() -> None:
    assert count(TARGET) == 4 and count(TARGET).dtype is torch.float64
    assert count([TARGET, TARGET[:1]]) == 6 == count(t for t in (TARGET, TARGET[:1]))
    assert count(TARGET, ignore_index=3) == 5
    assert count(TARGET, weight=WEIGHT) == WEIGHT.sum()
    assert count(TARGET.clamp(min=0).to(torch.uint8)) == 6  # -100 is none of theirs
    assert count(torch.zeros(3, 4)) == 12 == count(torch.zeros(3, 4), averaged=False)
    assert count(torch.zeros(0, dtype=torch.int64)) == 0


def test_a_loss_over_it_is_the_mean() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    for settings in ({}, {"weight": WEIGHT}):
        whole = F.cross_entropy(x, TARGET.flatten(), **settings)
        divided = F.cross_entropy(
            x, TARGET.flatten(), **settings, denominator=count(TARGET, **settings)
        )
        torch.testing.assert_close(divided, whole)


@pytest.mark.parametrize(
    ("arguments", "settings", "kind", "words"),
    [
        (([],), {}, ValueError, "target is an empty list"),
        ((3,), {}, TypeError, "argument 'target' must be Tensor, not int"),
        (([TARGET, 3],), {}, TypeError, r"argument 'target\[1\]' must be Tensor, not int"),
        ((TARGET, None), {}, TypeError, "must be process groups or device meshes .*, got NoneType"),
        ((TARGET,), {"weight": WEIGHT[:3]}, IndexError, "none of weight's 3 classes"),
    ],
)
def test_refused(arguments: Any, settings: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"distributed.count: .*{words}"):
        count(*arguments, **settings)


def own(rank: int) -> Tensor:
    """Two processes have 4 and 1 that count."""
    return TARGET if rank % 2 == 0 else torch.tensor([-100, 3])


def of_processes(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("outer", "inner"))
    flat = init_device_mesh("cpu", (world,))
    everyone, t = dist.group.WORLD, own(rank)
    found = {
        "averaged": count(t, everyone),
        "added up": count(t, everyone, averaged=False),
        "of steps": count([t, t], everyone),
        "of a mesh": count(t, mesh),
        "of a part": count(t, mesh["inner"]),
        "of two groups": count(t, mesh.get_group("outer"), mesh.get_group("inner")),
        "weights": count(t, everyone, weight=WEIGHT),
    }
    long = torch.tensor([0, 1, -100, 3, 2, -100, 1])
    for name, placement in (("sharded", Shard(0)), ("replicated", Replicate())):
        whole = distribute_tensor(long, flat, [placement])
        found[name] = count(whole)
        found[f"weights, {name}"] = count(whole, weight=WEIGHT)
        beside = distribute_tensor(WEIGHT, flat, [Shard(0)])
        found[f"both {name}"] = count(whole, weight=beside)
    numbers = {name: value.item() for name, value in found.items()}
    for name, arguments in {
        "bad": (t if rank else torch.tensor([7]), everyone),
    }.items():
        try:
            count(*arguments, weight=WEIGHT)
        except IndexError as error:
            numbers[name] = str(error)
    inside = dist.new_group([0])
    try:
        numbers["alone"] = count(t, inside).item()
    except ValueError as error:
        numbers["alone"] = str(error)
    return numbers


def check(world: int) -> None:
    pairs = world // 2
    every = ranks.run(world, of_processes, world)
    for rank, found in enumerate(every):
        assert found["averaged"] == 5 * pairs / world
        assert found["added up"] == 5 * pairs
        assert found["of steps"] == 10 * pairs / world
        assert found["of a mesh"] == found["of two groups"] == 5 * pairs / world
        assert found["of a part"] == 2.5
        assert found["weights"] == pairs * (WEIGHT.sum() + 4) / world
        for name in ("sharded", "replicated"):
            assert found[name] == 5
            weights = WEIGHT[[0, 1, 3, 2, 1]].sum()
            assert found[f"weights, {name}"] == found[f"both {name}"] == weights
        assert "none of weight's 4 classes" in found["bad"]
        if rank == 0:
            assert found["alone"] == 4
        else:
            assert f"this process, rank {rank}, is no member of the group" in found["alone"]


def test_of_two_processes() -> None:
    check(2)


@pytest.mark.nightly
def test_of_four_processes() -> None:
    check(4)


def test_the_library_does_not_import_torch_distributed() -> None:
    """What a plain `import torch` leaves out takes seconds."""
    code = (
        "import sys, torch; before = set(sys.modules); import fusedloss.distributed; "
        "new = [m for m in set(sys.modules) - before if m.startswith('torch.distributed')]; "
        "fusedloss.distributed.count(torch.tensor([1])); assert not new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
