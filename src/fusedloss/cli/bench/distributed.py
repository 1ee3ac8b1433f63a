"""`fusedloss bench --distributed`: a head whose classes are divided among processes, beside one and PyTorch.

Each process has one thread. Its clock is its own CPU time, which other programs do not stretch, and its
memory is what forward and backward take beside the tensors they are given, gradients included.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812

import fusedloss

from ..processes import MEBI, growth, in_a_process, small_pages
from . import tables
from .machine import Run
from .targets import Target

SHAPES, QUICK_SHAPES = ((1024, 512, 16384), (2048, 512, 32768)), ((1024, 512, 16384),)
WORLD = 2
ONE, OURS, PLACED, THEIRS = "one process", "class_group", "DTensors", "PyTorch, loss_parallel"
VARIANTS = (ONE, OURS, PLACED, THEIRS)
SHARE, MEMORY = 0.56, 0.25  # of one process's time, of PyTorch's memory
TIMEOUT = 300.0  # seconds

Step = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """Of the process that took most."""

    shape: tuple[int, int, int]
    variant: str
    seconds: float
    bytes: int
    loss: float


def drawn(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    n, d, v = shape
    generator = Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator).div_(d**0.5)
    return x, weight, torch.randint(v, (n,), generator=generator)


def step_of(variant: str, shape: tuple[int, int, int]) -> Step:
    """Forward and backward of this process; it gives the loss."""
    x, weight, target = drawn(shape)
    if variant in (ONE, OURS):
        more: dict[str, Any] = {}
        if variant == OURS:
            more["class_group"] = torch.distributed.group.WORLD
            weight = weight.chunk(WORLD)[torch.distributed.get_rank()].clone()
        plain = x.requires_grad_(), weight.requires_grad_()

        def ours() -> Tensor:
            loss = fusedloss.linear_cross_entropy(*plain, target, **more)
            return _backward(loss, *plain)

        return ours
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (WORLD,))
    leaves = (
        distribute_tensor(x, mesh, [Replicate()]).requires_grad_(),
        distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(),
    )
    placed = distribute_tensor(target, mesh, [Replicate()])

    def by_dtensors() -> Tensor:
        if variant == PLACED:
            return _backward(fusedloss.linear_cross_entropy(*leaves, placed), *leaves)
        with loss_parallel():
            return _backward(F.cross_entropy(F.linear(*leaves), placed), *leaves)

    return by_dtensors


def _backward(loss: Tensor, *leaves: Tensor) -> Tensor:
    loss.backward()
    for leaf in leaves:
        leaf.grad = None
    return loss.detach()


def measure_rank(
    rank: int, world: int, store: str, variant: str, shape: tuple[int, int, int], rounds: int
) -> tuple[float, int, float]:
    """The least CPU time of a call, its memory and the loss; in a process of its own."""
    torch.set_num_threads(1)
    small_pages()
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        import torch.distributed as distributed

        found = distributed.FileStore(store, world)
        distributed.init_process_group("gloo", store=found, rank=rank, world_size=world)
    step = step_of(variant, shape)
    loss = step()
    loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    taken = growth(step)
    if world > 1:
        distributed.barrier()
    return min(seconds), taken, loss.item()


def measure(variant: str, shape: tuple[int, int, int], rounds: int) -> Measured:
    world = 1 if variant == ONE else WORLD
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(world) as threads:
        running = [
            threads.submit(
                in_a_process, measure_rank, rank, world, f"{folder}/store", variant, shape, rounds
            )
            for rank in range(world)
        ]
        seconds, taken, losses = zip(*(each.result(TIMEOUT) for each in running), strict=True)
    return Measured(shape, variant, max(seconds), max(taken), losses[0])


def ratio(results: list[Measured], ours: str, other: str, of: str) -> float | None:
    """Of the first shape."""
    found = {r.variant: getattr(r, of) for r in results if r.shape == results[0].shape}
    return found[ours] / found[other] if {ours, other} <= set(found) else None


def targets(results: list[Measured]) -> list[Target]:
    found = []
    for ours in (OURS, PLACED):
        for other, of, bound in (
            (ONE, "seconds", SHARE),
            (THEIRS, "seconds", 1.0),
            (THEIRS, "bytes", MEMORY),
        ):
            value = ratio(results, ours, other, of)
            found.append(Target(f"{ours} / {other}, {of}", partial(_known, value), bound))
    return found


def _known(value: float | None, _: Any) -> float | None:
    return value


def run(args: argparse.Namespace, threads: int) -> int:
    """Measure and report; 0, or 1 where the losses differ or a case failed."""
    this = Run(1, 120)
    results: list[Measured] = []
    failed = False
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        for variant in VARIANTS:
            try:
                results.append(measure(variant, shape, 5 if args.quick else 15))
            except RuntimeError as error:
                this.console.print(f"{shape}, {variant}: {error}", style="yellow", markup=False)
                failed = True
    this.console.print(table(results), tables.targets_table([], targets(results)))
    this.write(args.output, this.document(kind="distributed", results=[asdict(r) for r in results]))
    losses = {shape: [r.loss for r in results if r.shape == shape] for shape in SHAPES}
    apart = any(max(each) - min(each) > 1e-4 for each in losses.values() if each)
    return int(failed or apart or not results)


def table(results: list[Measured]) -> Table:
    found = Table(title=f"{WORLD} processes of one thread, forward and backward; of the slower one")
    for column in ("rows x features x classes", "variant", "CPU seconds", "MiB", "loss"):
        found.add_column(column, justify="left" if column == "variant" else "right")
    for r in results:
        sizes = " x ".join(map(str, r.shape))
        found.add_row(
            sizes, r.variant, f"{r.seconds:.3f}", f"{r.bytes / MEBI:.0f}", f"{r.loss:.6f}"
        )
    return found
