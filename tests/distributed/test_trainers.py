"""Three steps of a training on several processes are those of one process, whoever spreads the model.

Processes and steps have unequal counts of targets. Everything is of float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import fusedloss
from distributed import ranks
from fusedloss import functional as F  # noqa: N812
from fusedloss.distributed import count

CLASSES, FEATURES, ROWS, LENGTH, STEPS = 10, 6, 8, 5, 3
Batch = tuple[Tensor, Tensor]


class Head(nn.Linear):
    """A head whose loss has no logits, where there is a target."""

    def forward(self, h: Tensor, target: Tensor | None = None, **settings: Any) -> Tensor:
        if target is None:
            return super().forward(h)
        return F.linear_cross_entropy(h, self.weight, target, linear_bias=self.bias, **settings)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, FEATURES)
        self.first, self.second = nn.Linear(FEATURES, 12), nn.Linear(12, FEATURES)
        self.head = Head(FEATURES, CLASSES)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embedding(ids))))

    def forward(self, ids: Tensor, target: Tensor | None = None, **settings: Any) -> Tensor:
        return self.head(self.hidden(ids), target, **settings)


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batch(step: int) -> Batch:
    """The rows of all processes: half of the targets of the first rows do not count, and one row has none."""
    generator = torch.Generator().manual_seed(step)
    ids, target = torch.randint(CLASSES, (2, ROWS, LENGTH), generator=generator)
    drop = torch.rand(ROWS, LENGTH, generator=generator) < torch.linspace(0.7, 0, ROWS)[:, None]
    target[drop] = -100
    target[2] = -100
    return ids, target


def part(step: int, rank: int, world: int) -> Batch:
    """Of a process; the first has more rows."""
    edges = [0, *(ROWS - world + k for k in range(1, world + 1))] if world > 1 else [0, ROWS]
    ids, target = batch(step)
    return ids[edges[rank] : edges[rank + 1]], target[edges[rank] : edges[rank + 1]]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)


def trained(module: nn.Module, step_of: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """The parameters after all steps, and the losses."""
    optimizer = sgd(module)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(step_of(step).detach().double())
        optimizer.step()
    names = {n.removeprefix("module."): p.detach() for n, p in module.named_parameters()}
    found = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in names.items()}
    return {**found, "losses": torch.stack(losses)}


@functools.cache
def alone() -> dict[str, Tensor]:
    """In one process, with all rows: PyTorch's own losses of logits."""
    module = model()

    def step(k: int) -> Tensor:
        ids, target = batch(k)
        loss = nn.functional.cross_entropy(module(ids).flatten(0, 1), target.flatten())
        loss.backward()
        return loss.detach()

    return trained(module, step)


def mean_of(loss: Tensor) -> Tensor:
    """Over the processes: what they divide by is the count of all over their number."""
    loss = loss.detach().clone()
    dist.all_reduce(loss, dist.ReduceOp.AVG)
    return loss


# Each gives the parameters after three steps, on its process.
Way = Callable[[int, int], dict[str, Tensor]]
WAYS: dict[str, Way] = {}


def way(function: Way) -> Way:
    WAYS[function.__name__] = function
    return function


def logits_loss(module: nn.Module, ids: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
    return F.cross_entropy(module(ids).flatten(0, 1), target.flatten(), denominator=denominator)


def head_loss(module: nn.Module, ids: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
    loss: Tensor = module(ids, target, denominator=denominator)
    return loss


def averaged(
    module: nn.Module, rank: int, world: int, loss_of: Callable[..., Tensor], **settings: Any
) -> dict[str, Tensor]:
    def step(k: int) -> Tensor:
        ids, target = part(k, rank, world)
        loss = loss_of(module, ids, target, count(target, dist.group.WORLD, **settings))
        loss.backward()
        return mean_of(loss)

    return trained(module, step)


@way
def ddp_of_logits(rank: int, world: int) -> dict[str, Tensor]:
    return averaged(nn.parallel.DistributedDataParallel(model()), rank, world, logits_loss)


@way
def ddp_of_a_head(rank: int, world: int) -> dict[str, Tensor]:
    return averaged(nn.parallel.DistributedDataParallel(model()), rank, world, head_loss)


@way
def ddp_of_a_module(rank: int, world: int) -> dict[str, Tensor]:
    criterion = fusedloss.nn.CrossEntropyLoss()

    def loss(module: nn.Module, ids: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
        found: Tensor = criterion(
            module(ids).transpose(1, 2), target, denominator=denominator.item()
        )
        return found

    return averaged(nn.parallel.DistributedDataParallel(model()), rank, world, loss)


@way
def ddp_of_several_steps(rank: int, world: int) -> dict[str, Tensor]:
    """Gradients are reduced once, after steps of unequal counts."""
    module = nn.parallel.DistributedDataParallel(model())

    def step(k: int) -> Tensor:
        ids, target = part(k, rank, world)
        pieces = list(zip(ids.tensor_split(3), target.tensor_split(3), strict=True))
        denominator = count([t for _, t in pieces], dist.group.WORLD)
        *first, last = (head_loss, logits_loss, head_loss)
        with module.no_sync():
            losses = []
            for loss_of, (i, t) in zip(first, pieces, strict=False):
                losses.append(loss_of(module, i, t, denominator))
                losses[-1].backward()
        losses.append(last(module, *pieces[-1], denominator))
        losses[-1].backward()
        return mean_of(torch.stack([loss.detach() for loss in losses]).sum())

    return trained(module, step)


def fsdp(**settings: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    module = model()
    fully_shard(module, **settings)
    return module


def fsdp_of_parts(**settings: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    module = model()
    for each in (module.first, module.second, module.head):
        fully_shard(each, **settings)
    fully_shard(module)
    return module


@way
def fsdp_root(rank: int, world: int) -> dict[str, Tensor]:
    return averaged(fsdp(), rank, world, head_loss)


@way
def fsdp_root_kept(rank: int, world: int) -> dict[str, Tensor]:
    return averaged(fsdp(reshard_after_forward=False), rank, world, head_loss)


@way
def fsdp_wrapped_head(rank: int, world: int) -> dict[str, Tensor]:
    return averaged(fsdp_of_parts(reshard_after_forward=True), rank, world, head_loss)


@way
def fsdp_wrapped_head_kept(rank: int, world: int) -> dict[str, Tensor]:
    return averaged(fsdp_of_parts(reshard_after_forward=False), rank, world, head_loss)


@way
def fsdp_wrapped_head_of_logits(rank: int, world: int) -> dict[str, Tensor]:
    return averaged(fsdp_of_parts(), rank, world, logits_loss)


@way
def fsdp_that_adds_up(rank: int, world: int) -> dict[str, Tensor]:
    """As torchtitan sets it: gradients are not averaged."""
    module = fsdp()
    module.set_gradient_divide_factor(1.0)

    def step(k: int) -> Tensor:
        ids, target = part(k, rank, world)
        loss = head_loss(module, ids, target, count(target, dist.group.WORLD, averaged=False))
        loss.backward()
        return world * mean_of(loss)

    return trained(module, step)


@way
def fsdp_unsharded_head(rank: int, world: int) -> dict[str, Tensor]:
    """The loss outside of the head's forward, whose weight is whole after unshard()."""
    from torch.distributed.fsdp import fully_shard

    class Outside(Model):
        def forward(self, ids: Tensor, target: Tensor | None = None, **settings: Any) -> Tensor:
            assert target is not None
            h, head = self.hidden(ids), self.head
            head.unshard()  # type: ignore[operator]
            return F.linear_cross_entropy(h, head.weight, target, linear_bias=head.bias, **settings)

    torch.manual_seed(0)
    module = Outside().double()
    fully_shard(module.head)
    fully_shard(module)
    return averaged(module, rank, world, head_loss)


class Tail(nn.Module):
    """The second stage of a pipeline."""

    def __init__(self, whole: Model) -> None:
        super().__init__()
        self.second, self.head = whole.second, whole.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(x))


class Start(nn.Module):
    def __init__(self, whole: Model) -> None:
        super().__init__()
        self.embedding, self.first = whole.embedding, whole.first

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.first(self.embedding(ids)))


def pipeline(rank: int, kind: str, scale_grads: bool) -> dict[str, Tensor]:
    from torch.distributed import pipelining

    pieces, whole = 4, model()
    stage_module: nn.Module = Tail(whole) if rank else Start(whole)
    device = torch.device("cpu")
    stage = pipelining.PipelineStage(stage_module, rank, 2, device)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), denominator=divisor[0])

    divisor: list[Tensor] = []
    schedule = getattr(pipelining, kind)(stage, pieces, loss_fn=loss_of, scale_grads=scale_grads)

    def step(k: int) -> Tensor:
        ids, target = batch(k)
        whole_count = count(target.chunk(pieces))  # all are here: of no other process
        divisor[:] = [whole_count / pieces if scale_grads else whole_count]
        losses: list[Tensor] = []
        schedule.step(*(() if rank else (ids,)), target=target if rank else None, losses=losses)
        total = torch.stack(losses).sum() if rank else torch.zeros((), dtype=torch.float64)
        total = total.detach() / (pieces if scale_grads else 1)
        dist.broadcast(total, 1)
        return total

    return trained(stage_module, step)


@way
def pipeline_gpipe(rank: int, world: int) -> dict[str, Tensor]:
    return pipeline(rank, "ScheduleGPipe", scale_grads=False)


@way
def pipeline_1f1b(rank: int, world: int) -> dict[str, Tensor]:
    return pipeline(rank, "Schedule1F1B", scale_grads=False)


@way
def pipeline_1f1b_of_means(rank: int, world: int) -> dict[str, Tensor]:
    return pipeline(rank, "Schedule1F1B", scale_grads=True)


def tensor_parallel(mesh: DeviceMesh) -> Model:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    module = model()
    plan = {
        "first": ColwiseParallel(),
        "second": RowwiseParallel(),
        "head": ColwiseParallel(input_layouts=Replicate(), use_local_output=False),
    }
    return parallelize_module(module, mesh, plan)  # type: ignore[return-value]


def of_classes(module: nn.Module, ids: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
    """Logits whose classes are sharded: DTensors, and targets that all processes of the mesh hold."""
    from torch.distributed.tensor import DTensor, Replicate

    logits: Any = module(ids)
    mesh = logits.device_mesh
    spread = DTensor.from_local(target.flatten(), mesh, [Replicate()] * mesh.ndim)
    return F.cross_entropy(logits.flatten(0, 1), spread, denominator=denominator)


@way
def tensor_parallel_logits(rank: int, world: int) -> dict[str, Tensor]:
    """All processes have all rows."""
    from torch.distributed.tensor import init_device_mesh

    module = tensor_parallel(init_device_mesh("cpu", (world,)))

    def step(k: int) -> Tensor:
        ids, target = batch(k)
        loss: Any = of_classes(module, ids, target, count(target))
        loss.backward()
        return loss.full_tensor()

    return trained(module, step)


def fsdp_and_tensor_parallel(rank: int, world: int, across: int) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (world // across, across), mesh_dim_names=("dp", "tp"))
    module = tensor_parallel(mesh["tp"])
    fully_shard(module.head, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])
    group = mesh.get_group("dp")

    def step(k: int) -> Tensor:
        ids, target = part(k, rank // across, world // across)
        loss: Any = of_classes(module, ids, target, count(target, mesh["dp"]))
        loss.backward()
        total = loss.full_tensor().detach().clone()
        dist.all_reduce(total, dist.ReduceOp.AVG, group=group)
        return total

    return trained(module, step)


@way
def fsdp_beside_tensor_parallel(rank: int, world: int) -> dict[str, Tensor]:
    return fsdp_and_tensor_parallel(rank, world, across=2)


@way
def fsdp_over_one_of_tensor_parallel(rank: int, world: int) -> dict[str, Tensor]:
    return fsdp_and_tensor_parallel(rank, world, across=1)


def every_way(rank: int, world: int, names: list[str]) -> dict[str, dict[str, Any]]:
    found = {name: WAYS[name](rank, world) for name in names}
    return {name: {n: t.tolist() for n, t in way.items()} for name, way in found.items()}


@functools.cache
def of_processes(world: int, names: tuple[str, ...]) -> list[dict[str, dict[str, Any]]]:
    return ranks.run(world, every_way, world, list(names))


def assert_like_one_process(name: str, world: int, names: tuple[str, ...]) -> None:
    want = alone()
    for found in of_processes(world, names):
        for key, value in found[name].items():
            exact = torch.tensor(value, dtype=torch.float64)
            torch.testing.assert_close(exact, want[key].double(), rtol=1e-12, atol=1e-13)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TWO = tuple(WAYS)
FOUR = tuple(name for name in WAYS if not name.startswith("pipeline"))  # of two stages


@pytest.mark.parametrize("name", TWO)
def test_of_two_processes(name: str) -> None:
    assert_like_one_process(name, 2, TWO)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FOUR)
def test_of_four_processes(name: str) -> None:
    assert_like_one_process(name, 4, FOUR)
