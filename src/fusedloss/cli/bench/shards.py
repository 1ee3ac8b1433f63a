"""`fusedloss bench --shards`: row losses of DTensors on two processes, beside the kernel on one shard."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Generator, Tensor

from ...front.definition import REGISTRY, Loss
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

    @property
    def ratio(self) -> float:
        return self.placed / self.shard


def measured(
    rank: int, folder: str, names: list[str], shape: tuple[int, ...], rounds: int
) -> list[Shards]:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found = []
    for name in names:
        loss = REGISTRY[name]
        local = loss.example(shape, torch.float32, Generator().manual_seed(rank))
        steps = [
            _step(loss, local),
            _step(loss, [DTensor.from_local(t, mesh, [Shard(0)]) for t in local]),
        ]
        samples: list[list[float]] = [[], []]
        for _ in range(rounds + 2):
            for step, seconds in zip(steps, samples, strict=True):
                dist.barrier()
                start = time.process_time()
                step()
                seconds.append(time.process_time() - start)
        kernel, placed = (min(each[2:]) for each in samples)
        found.append(Shards(name, shape, kernel, placed))
    dist.destroy_process_group()
    return found


def _step(loss: Loss, tensors: Sequence[Tensor]) -> Callable[[], None]:
    leaves = [t.detach().requires_grad_(k in loss.differentiable) for k, t in enumerate(tensors)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss.function(*leaves).backward()

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
    for column in ("loss", "shard", "kernel", "DTensors", "ratio", f"at most {AT_MOST:.2f}"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for r in results:
        shape = " x ".join(map(str, r.shape))
        word = "" if r.shape != SHAPE else "yes" if r.ratio <= AT_MOST else "no"
        times = (f"{1e3 * t:.3g}" for t in (r.shard, r.placed))
        table.add_row(r.loss, shape, *times, f"{r.ratio:.2f}", word)
    return table
