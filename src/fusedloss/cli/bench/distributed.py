"""`fusedloss bench --distributed`: a head whose classes are divided among processes, beside one and PyTorch.

Each process has one thread. Its clock is its own CPU time, which other programs do not stretch, and its
memory is what forward and backward take beside the tensors they are given, gradients included.
"""

from __future__ import annotations

import argparse
import itertools
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
CROSS_ENTROPY, DIVERGENCE = "linear_cross_entropy", "linear_kl_div"
VARIANTS = {CROSS_ENTROPY: (ONE, OURS, PLACED, THEIRS), DIVERGENCE: (ONE, OURS, PLACED)}
SHARE, MEMORY = 0.56, 0.25  # of one process's time, of PyTorch's memory
TIMEOUT = 300.0  # seconds

Step = Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """Of the process that took most."""

    head: str
    shape: tuple[int, int, int]
    variant: str
    seconds: float
    bytes: int
    loss: float


def drawn(head: str, shape: tuple[int, int, int]) -> list[tuple[Tensor, bool]]:
    """What the head takes: input, weight, and labels or the teacher's; each, and whether it has the classes."""
    n, d, v = shape
    generator = Generator().manual_seed(0)

    def pair() -> list[tuple[Tensor, bool]]:
        x = torch.randn(n, d, generator=generator)
        return [(x, False), (torch.randn(v, d, generator=generator).div_(d**0.5), True)]

    if head == DIVERGENCE:
        return pair() + pair()
    return [*pair(), (torch.randint(v, (n,), generator=generator), False)]


def step_of(head: str, variant: str, shape: tuple[int, int, int]) -> Step:
    """Forward and backward of this process; it gives the loss."""
    tensors, function = drawn(head, shape), getattr(fusedloss, head)
    if variant in (ONE, OURS):
        more: dict[str, Any] = {}
        plain = [t for t, _ in tensors]
        if variant == OURS:
            more["class_group"] = torch.distributed.group.WORLD
            rank = torch.distributed.get_rank()
            plain = [t.chunk(WORLD)[rank].clone() if own else t for t, own in tensors]
        own = [t.requires_grad_() for t in plain[:2]]

        def ours() -> Tensor:
            return _backward(function(*plain, **more), *own)

        return ours
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (WORLD,))
    placed = [distribute_tensor(t, mesh, [Shard(0) if own else Replicate()]) for t, own in tensors]
    leaves = [t.requires_grad_() for t in placed[:2]]

    def by_dtensors() -> Tensor:
        if variant == PLACED:
            return _backward(function(*placed), *leaves)
        with loss_parallel():
            return _backward(F.cross_entropy(F.linear(*leaves), placed[2]), *leaves)

    return by_dtensors


def _backward(loss: Tensor, *leaves: Tensor) -> Tensor:
    loss.backward()
    for leaf in leaves:
        leaf.grad = None
    return loss.detach()


def measure_rank(
    world: int,
    store: str,
    head: str,
    variant: str,
    shape: tuple[int, int, int],
    rounds: int,
    rank: int,
) -> tuple[float, int, float]:
    """The least CPU time of a call, its memory and the loss; in a process of its own."""
    torch.set_num_threads(1)
    small_pages()
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        import torch.distributed as distributed

        found = distributed.FileStore(store, world)
        distributed.init_process_group("gloo", store=found, rank=rank, world_size=world)
    step = step_of(head, variant, shape)
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


def measure(head: str, variant: str, shape: tuple[int, int, int], rounds: int) -> Measured:
    world = 1 if variant == ONE else WORLD
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(world) as threads:
        asked = partial(measure_rank, world, f"{folder}/store", head, variant, shape, rounds)
        running = [threads.submit(in_a_process, asked, rank) for rank in range(world)]
        seconds, taken, losses = zip(*(each.result(TIMEOUT) for each in running), strict=True)
    return Measured(head, shape, variant, max(seconds), max(taken), losses[0])


def ratio(results: list[Measured], head: str, ours: str, other: str, of: str) -> float | None:
    """Of the first shape."""
    found = {
        r.variant: getattr(r, of) for r in results if (r.head, r.shape) == (head, results[0].shape)
    }
    return found[ours] / found[other] if {ours, other} <= set(found) else None


def targets(results: list[Measured]) -> list[Target]:
    found = []
    bounds = ((ONE, "seconds", SHARE), (THEIRS, "seconds", 1.0), (THEIRS, "bytes", MEMORY))
    for head, ours in itertools.product(VARIANTS, (OURS, PLACED)):
        for other, of, bound in bounds:
            if other in VARIANTS[head]:
                value = partial(_known, ratio(results, head, ours, other, of))
                found.append(Target(f"{head}, {ours} / {other}, {of}", value, bound))
    return found


def _known(value: float | None, _: Any) -> float | None:
    return value


def run(args: argparse.Namespace, threads: int) -> int:
    """Measure and report; 0, or 1 where the losses differ or a case failed."""
    this = Run(1, 120)
    results: list[Measured] = []
    failed = False
    for shape in QUICK_SHAPES if args.quick else SHAPES:
        for head, variant in ((h, v) for h, variants in VARIANTS.items() for v in variants):
            try:
                results.append(measure(head, variant, shape, 5 if args.quick else 15))
            except RuntimeError as error:
                words = f"{head}, {shape}, {variant}: {error}"
                this.console.print(words, style="yellow", markup=False)
                failed = True
    this.console.print(table(results), tables.targets_table([], targets(results)))
    this.write(args.output, this.document(kind="distributed", results=[asdict(r) for r in results]))
    losses: dict[Any, list[float]] = {}
    for r in results:
        losses.setdefault((r.head, r.shape), []).append(r.loss)
    apart = any(max(each) - min(each) > 1e-4 for each in losses.values())
    return int(failed or apart or not results)


def table(results: list[Measured]) -> Table:
    found = Table(title=f"{WORLD} processes of one thread, forward and backward; of the slower one")
    for column in ("head", "rows x features x classes", "variant", "CPU seconds", "MiB", "loss"):
        found.add_column(column, justify="left" if column in ("head", "variant") else "right")
    for r in results:
        sizes = " x ".join(map(str, r.shape))
        found.add_row(
            r.head, sizes, r.variant, f"{r.seconds:.3f}", f"{r.bytes / MEBI:.0f}", f"{r.loss:.6f}"
        )
    return found
