"""`fusedloss bench --calls`: what a call costs before its arithmetic begins, small calls, and the import.

Small calls are in `small.py`. The others are on tensors of 3 x 5, without gradients. "Before the kernel" is
a call whose kernel is replaced by a constant: checks of the arguments and the choice of the path. PyTorch's
own part is that of its function in Python, with its operator replaced; what the operator checks itself counts
as kernel. The call is one of many alike, as in training.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from rich.table import Table

from ...front.definition import REGISTRY, Loss
from ...route import memo
from ..arguments import chosen_losses
from . import small
from .cases import SIZES, TIMED, Case, calls
from .harness import Plan, Work, interleave, wall, warm_up
from .machine import Run

QUICK, WHOLE = (0.05, 0.0005, 9), (0.3, 0.0005, 30)  # of a Plan: seconds, seconds a sample, samples
IMPORT = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import fusedloss
print(between - start, time.perf_counter() - between)
"""


@dataclass
class Calls:
    """Seconds of a call of one loss, whole and without its kernel: the shortest, to which others only add."""

    loss: str
    ours: float
    torch: float
    ours_before: float
    torch_before: float | None  # where PyTorch has no operator for the loss

    @property
    def beyond(self) -> float | None:
        return None if self.torch_before is None else self.ours_before - self.torch_before


def operator(name: str) -> tuple[Any, str] | None:
    """Where PyTorch's function finds its operator."""
    for where in (torch._C._nn, torch):
        for found in (f"{name}_nd", f"{name}_loss", name):
            if hasattr(where, found):
                return where, found
    return None


@contextmanager
def _replaced(where: Any, name: str) -> Iterator[None]:
    constant = torch.zeros(())
    with mock.patch.object(where, name, lambda *_, **__: constant):
        yield


@contextmanager
def _without_kernels(name: str) -> Iterator[None]:
    """Calls like those that were made run none."""
    constant = torch.zeros(())
    with ExitStack() as stack:
        for key, those in memo.known.items():
            for it in those if key[0] == name else ():
                for run in ("run", "repeater"):
                    if getattr(it, run):
                        stack.enter_context(mock.patch.object(it, run, lambda *_: constant))
        yield


def measure(loss: Loss, plan: Plan) -> Calls:
    work = Work(Case("", loss.key, SIZES["15"]))
    functions = {"ours": loss.function, "torch": loss.torch_function}

    def shortest(*chosen: str) -> list[float]:
        steps = {k: partial(functions[k], *work.bare, **work.settings) for k in chosen}
        for each in steps.values():
            warm_up(each)
        samples, _ = interleave({k: partial(wall, step) for k, step in steps.items()}, plan)
        return [min(samples[name]) for name in chosen]

    whole = shortest("ours", "torch")
    replaced = operator(loss.name)
    with ExitStack() as stack:
        stack.enter_context(_without_kernels(loss.name))
        if replaced:
            stack.enter_context(_replaced(*replaced))
        before = shortest(*("ours", "torch")[: 1 + bool(replaced)])
    return Calls(loss.name, whole[0], whole[1], before[0], before[1] if replaced else None)


def imports(times: int) -> list[tuple[float, float]]:
    """Seconds of `import torch`, and of `import fusedloss` after it, in new interpreters."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    found = []
    for k in range(times + 1):
        done = subprocess.run(
            [sys.executable, "-c", IMPORT], env=environment, check=True, stdout=subprocess.PIPE
        )
        if k:  # the first one compiles and fetches the files
            first, second = map(float, done.stdout.split())
            found.append((first, second))
    return found


def run(args: argparse.Namespace, threads: int) -> int:
    """Measure and report; 0."""
    this = Run(threads, 120)
    torch.set_num_threads(threads)
    plan = Plan((), threads, *(QUICK if args.quick else WHOLE), most=2000)
    chosen = chosen_losses(args.only, TIMED)
    with torch.no_grad():
        results = [measure(REGISTRY[key], plan) for key in calls() if key in chosen]
    found = [(case, small.measure(case, plan)) for case in small.cases(chosen)]
    few = [each for _, each in found if isinstance(each, small.Small)]
    seconds = imports(3 if args.quick else 9)
    this.console.print(table(results), small.table(few), small.verdict(few))
    for case, why in found:
        if isinstance(why, str):
            this.console.print(f"{case.title}: {why}", markup=False)
    of_torch, of_ours = (statistics.median(each) * 1e3 for each in zip(*seconds, strict=True))
    this.console.print(
        f"import torch: {of_torch:.0f} ms; import fusedloss after it: {of_ours:.0f} ms"
    )
    document = this.document(kind="calls", imports=seconds, results=[asdict(r) for r in results])
    document["small"] = [each.to_json() for each in few]
    this.write(args.output, document)
    return 0


def table(results: list[Calls]) -> Table:
    table = Table(title="a call on 3 x 5, without gradients, microseconds")
    columns = ("loss", "PyTorch", "fusedloss", "before the kernel: PyTorch", "fusedloss", "beyond")
    for column in columns:
        table.add_column(column, justify="left" if column == "loss" else "right")
    for r in results:
        times = (r.torch, r.ours, r.torch_before, r.ours_before, r.beyond)
        table.add_row(r.loss, *("" if t is None else f"{1e6 * t:.1f}" for t in times))
    return table
