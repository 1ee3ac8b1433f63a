"""`fusedloss bench --calls`: what a call costs before its arithmetic begins, and what the import costs.

On tensors of 3 x 5, without gradients. "Before the kernel" is a call whose kernel is replaced by a constant:
checks of the arguments and the choice of the path. PyTorch's own part is that of its function in Python,
with its operator replaced; what the operator checks itself counts as kernel. The call is one of many alike,
as in training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import fusedloss

from ...autograd import functions as autograd
from ...front.definition import REGISTRY, Loss
from . import command as bench
from .cases import SIZES, Case
from .harness import Plan, Step, interleave, warm_up

# Where PyTorch's functions find their operators.
OPERATORS: dict[str, tuple[Any, str]] = {
    "mse_loss": (torch._C._nn, "mse_loss"),
    "binary_cross_entropy": (torch._C._nn, "binary_cross_entropy"),
    "binary_cross_entropy_with_logits": (torch, "binary_cross_entropy_with_logits"),
    "kl_div": (torch, "kl_div"),
    "cross_entropy": (torch._C._nn, "cross_entropy_loss"),
    "nll_loss": (torch._C._nn, "nll_loss_nd"),
    "triplet_margin_loss": (torch, "triplet_margin_loss"),
}
QUICK, WHOLE = (0.5, 0.0005, 9), (3.0, 0.0005, 30)  # of a Plan: seconds, seconds a sample, samples
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
    torch_before: float

    @property
    def beyond(self) -> float:
        return self.ours_before - self.torch_before


@contextmanager
def _replaced(where: Any, name: str) -> Iterator[None]:
    constant = torch.zeros(())
    with mock.patch.object(where, name, lambda *_, **__: constant):
        yield


def measure(loss: Loss, plan: Plan) -> Calls:
    generator = torch.Generator().manual_seed(0)
    tensors = loss.example(SIZES["15"], torch.float32, generator)
    settings = Case("", loss.key, SIZES["15"]).settings(tensors, generator)
    functions = {"ours": loss.function, "torch": getattr(torch.nn.functional, loss.name)}

    def step(function: Callable[..., Any]) -> Step:
        return lambda: function(*tensors, **settings)

    def shortest(*chosen: str) -> list[float]:
        steps = {name: step(functions[name]) for name in chosen}
        for each in steps.values():
            warm_up(each)
        samples, _ = interleave(steps, plan, lambda *_: None)
        return [min(samples[name]) for name in chosen]

    whole = shortest("ours", "torch")
    with _replaced(autograd, "repeat"), _replaced(*OPERATORS[loss.name]):
        before = shortest("ours", "torch")
    return Calls(loss.name, *whole, *before)


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
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    torch.set_num_threads(threads)
    started, here = time.perf_counter(), bench.machine(threads)
    console.print(bench.headline(here), style="dim", markup=False)
    plan = Plan((), threads, *(QUICK if args.quick else WHOLE), most=2000)
    losses = [loss for key, loss in REGISTRY.items() if key in OPERATORS]
    with torch.no_grad():
        results = [measure(loss, plan) for loss in losses]
    seconds = imports(3 if args.quick else 9)
    console.print(table(results))
    of_torch, of_ours = (statistics.median(each) * 1e3 for each in zip(*seconds, strict=True))
    console.print(f"import torch: {of_torch:.0f} ms; import fusedloss after it: {of_ours:.0f} ms")
    document = {
        "format": 1,
        "kind": "calls",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fusedloss": {"version": fusedloss.__version__, "commit": bench.commit()},
        "torch": torch.__version__,
        "machine": here,
        "seconds": round(time.perf_counter() - started),
        "imports": seconds,
        "results": [asdict(r) for r in results],
    }
    args.output.write_text(json.dumps(document, allow_nan=False) + "\n")
    console.print(f"Wrote {args.output} after {document['seconds']} s.")
    return 0


def table(results: list[Calls]) -> Table:
    table = Table(title="a call on 3 x 5, without gradients, microseconds")
    columns = ("loss", "PyTorch", "fusedloss", "before the kernel: PyTorch", "fusedloss", "beyond")
    for column in columns:
        table.add_column(column, justify="left" if column == "loss" else "right")
    for r in results:
        times = (r.torch, r.ours, r.torch_before, r.ours_before, r.beyond)
        table.add_row(r.loss, *(f"{1e6 * seconds:.1f}" for seconds in times))
    return table
