"""`fusedloss bench --shards`: row losses of DTensors on two processes, beside the kernel on one shard."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Generator, Tensor

from ...core import torch_state
from ...front.definition import REGISTRY
from ..arguments import chosen_losses
from ..processes import in_a_process
from .cases import TIMED
from .machine import Run

WORLD, AT_MOST = 2, 1.10
SHAPE, SMALL = (4096, 1024), (32, 32)  # of a shard
LOSSES = (
    *("mse_loss", "binary_cross_entropy_with_logits", "kl_div", "cross_entropy", "nll_loss"),
    *("softmax_focal_loss", "cosine_embedding_loss", "triplet_margin_loss", "multi_margin_loss"),
)
QUICK, WHOLE = 5, 25  # rounds


@dataclass
class Shards:
    """Seconds of CPU of a process, forward and backward, the least of all rounds: others only add to it."""

    loss: str
    shape: tuple[int, ...]
    shard: float  # the kernel, of this process's shard alone
    placed: float  # DTensors
    exchange: float  # by how much an autograd function that only gathers takes longer of DTensors

    @property
    def ratio(self) -> float:
        return self.placed / self.shard

    @property
    def part(self) -> float:
        """What PyTorch's gather, leaves and backward alone add to the ratio."""
        return self.exchange / self.shard


def measured(
    rank: int, folder: str, names: list[str], shape: tuple[int, ...], rounds: int
) -> list[Shards]:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    scalar = torch_state.spec_of(DTensor.from_local(torch.zeros(()), mesh, [Replicate()]))
    found = []
    for name in names:
        loss = REGISTRY[name]
        local = loss.example(shape, torch.float32, Generator().manual_seed(rank))
        placed = [DTensor.from_local(t, mesh, [Shard(0)]) for t in local]
        kernel, whole = least(
            [_step(loss.function, t, loss.differentiable) for t in (local, placed)], rounds
        )
        nothing, gather = least(
            [
                _step(_Exchange.apply, t[:1], (0,), at)
                for t, at in ((local, None), (placed, scalar))
            ],
            rounds,
        )
        found.append(Shards(name, shape, kernel, whole, gather - nothing))
    dist.destroy_process_group()
    return found


def least(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """Of each step, taken in turns."""
    import torch.distributed as dist

    samples: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 2):
        for step, seconds in zip(steps, samples, strict=True):
            dist.barrier()
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
    return [min(each[2:]) for each in samples]


class _Exchange(torch.autograd.Function):
    """A product as the gradient; and of a DTensor one gather of three numbers, and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Any, of_result: Any) -> Any:
        ctx.place, kind = None if of_result is None else torch_state.spec_of(x), type(x)
        # It leaves the caches as a kernel does.
        ctx.grad = (x if of_result is None else torch_state.local_of(x)) * 2.0
        if of_result is None:
            return x.new_zeros(())
        told = torch.empty(3 * WORLD, dtype=torch.float64)
        torch_state.all_gather(x.device_mesh.get_group(), told, torch.zeros(3, dtype=torch.float64))
        return kind(torch.full((), sum(told.tolist())), of_result, requires_grad=False)

    @staticmethod
    def backward(ctx: Any, incoming: Any) -> Any:
        grad, place, ctx.grad = ctx.grad, ctx.place, None
        return grad if place is None else type(incoming)(grad, place, requires_grad=False), None


def _step(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    differentiable: Sequence[int],
    *more: Any,
) -> Callable[[], None]:
    leaves = [t.detach().requires_grad_(k in differentiable) for k, t in enumerate(tensors)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        function(*leaves, *more).backward()

    return step


def run(args: argparse.Namespace, _: int) -> int:
    """Measure and report; 0."""
    this = Run(1, 120)
    chosen = chosen_losses(args.only, TIMED)
    names = [name for name in LOSSES if name in chosen]
    results = []
    for shape in (SHAPE, SMALL):
        rounds = (QUICK if args.quick else WHOLE) * (1 if shape == SHAPE else 10)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORLD) as pool:
            ranks = pool.map(
                lambda *given: in_a_process(measured, *given),
                range(WORLD),
                *([each] * WORLD for each in (folder, names, shape, rounds)),
            )
            results += [max(each, key=lambda r: r.ratio) for each in zip(*ranks, strict=True)]
    this.console.print(table(results))
    document = this.document(kind="shards", results=[asdict(r) for r in results])
    this.write(args.output, document)
    return 0


def table(results: list[Shards]) -> Table:
    title = f"{WORLD} processes of one thread: ms of CPU of a process, forward and backward"
    table = Table(title=title)
    columns = (
        "loss",
        "shard",
        "kernel",
        "DTensors",
        "ratio",
        "PyTorch's part",
        f"at most {AT_MOST:.2f}",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "loss" else "right")
    for r in results:
        shape = " x ".join(map(str, r.shape))
        word = "" if r.shape != SHAPE else "yes" if r.ratio <= AT_MOST else "no"
        times = (f"{1e3 * t:.3g}" for t in (r.shard, r.placed))
        table.add_row(r.loss, shape, *times, f"{r.ratio:.2f}", f"{r.part:.2f}", word)
    return table
