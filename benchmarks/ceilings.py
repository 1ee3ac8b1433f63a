"""What bounds the losses: the arithmetic of their kernels, the memory's speed, or fresh pages.

    python benchmarks/ceilings.py --output ceilings.json

"Arithmetic" is the time that an element more takes when everything lies in the second-level cache, on one
core: the slope between two sizes, so that what a call costs by itself falls out. "Floor" is the larger of that,
shared among the threads, and of the yardstick, which moves the same bytes, into an output that is there; and
beside it what the system takes to make fresh pages for an output, as large as they come, and what an autograd
function that computes nothing takes forward and backward when the arrays have gone through the caches. No
kernel with these instructions can be faster; "ours" is how fast it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedloss.cli.bench import machine
from fusedloss.cli.bench.cases import CASES, Case, yardstick
from fusedloss.cli.bench.harness import Work
from fusedloss.engines.cpu.linear import advise_huge_pages

# Elements, beyond the kernels of small inputs; three arrays of the larger take 288 KiB.
SIZES = (8192, 24576)
TITLES = (
    *("MSE 4M", "BCE 4M", "BCE with logits 4M", "KL 4M", "KL log_target 4M", "CE 4096x1024"),
    *(case.title for case in CASES if case.group == "beyond"),
    *("CE 1024x32000", "CE 256x128256"),
)
COLUMNS = (
    "ns an element",
    "pages, ms",
    "autograd, ms",
    "floor / yardstick",
    "ours / yardstick",
    "ours / floor",
)


def shortest(step: Callable[[], object], seconds: float) -> float:
    """Of as many calls as fit: what others take of the machine only adds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return best


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        return incoming


def measure(case: Case, threads: int, seconds: float) -> dict[str, float]:
    def sized(elements: int) -> Work:
        columns = min(case.shape[-1], 1024)
        return Work(Case(case.title, case.loss, (elements // columns, columns), case.dtype))

    torch.set_num_threads(1)
    small, more = (shortest(sized(n).step("ours"), seconds) for n in SIZES)
    torch.set_num_threads(threads)
    whole = Work(case)
    rod = yardstick(case.row, whole.bare)

    def fresh() -> None:
        out = [torch.empty_like(whole.bare[0])]
        advise_huge_pages(out[0])
        rod.held(out, *whole.bare)

    hold = whole.step("held")

    def empty() -> float:
        hold()
        start = time.perf_counter()
        Nothing.apply(leaf).backward()
        spent = time.perf_counter() - start
        leaf.grad = None
        return spent

    leaf = torch.zeros((), requires_grad=True)
    autograd = statistics.median(empty() for _ in range(50))
    arithmetic = (more - small) / (SIZES[1] - SIZES[0])
    held = shortest(hold, seconds)
    pages = max(0.0, shortest(fresh, seconds) - held)
    floor = max(arithmetic * case.numel / threads, held) + pages + autograd
    moved, ours = (shortest(whole.step(v), 2 * seconds) for v in ("yardstick", "ours"))
    return {
        "arithmetic": arithmetic,
        "pages": pages,
        "autograd": autograd,
        "yardstick": moved,
        "floor": floor,
        "ours": ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("ceilings.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of eight times a case")
    args = parser.parse_args()
    found = {}
    print(f"{'':22}" + "".join(f"{column:>19}" for column in COLUMNS))
    for case in CASES:
        if case.title in TITLES:
            t = found[case.title] = measure(case, args.threads, args.seconds)
            ratios = t["floor"] / t["yardstick"], t["ours"] / t["yardstick"], t["ours"] / t["floor"]
            figures = (1e9 * t["arithmetic"], 1e3 * t["pages"], 1e3 * t["autograd"], *ratios)
            print(f"{case.title:22}" + "".join(f"{figure:19.2f}" for figure in figures))
    document = {
        "kind": "ceilings",
        "commit": machine.commit(),
        "torch": torch.__version__,
        "machine": machine.machine(args.threads),
    }
    args.output.write_text(json.dumps({**document, "results": found}) + "\n")


if __name__ == "__main__":
    main()
