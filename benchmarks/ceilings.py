"""What bounds the losses that fit the caches: the arithmetic of their kernels, or the memory's speed.

    python benchmarks/ceilings.py --output ceilings.json

"Arithmetic" is the time that an element more takes when everything lies in the second-level cache, on one
core: the slope between two sizes, so that what a call costs by itself falls out. "Floor" is the larger of that,
shared among the threads, and of the yardstick, which moves the same bytes. No kernel with these
instructions can be faster; "ours" is how fast it is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fusedloss.cli import bench
from fusedloss.cli.cases import CASES, Case
from fusedloss.cli.measure import Workload

LARGE = 4096 * 1024
SIZES = (4096, 20480)  # elements; three arrays of the larger take 240 KiB
TITLES = ("MSE 4M", "BCE 4M", "BCE with logits 4M", "KL 4M", "KL log_target 4M", "CE 4096x1024")


def shortest(step: Callable[[], object], seconds: float) -> float:
    """Of as many calls as fit: what others take of the machine only adds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return best


def measure(case: Case, threads: int, seconds: float) -> dict[str, float]:
    def sized(elements: int) -> Workload:
        rows = elements // case.shape[-1]
        return Workload(Case(case.title, case.loss, (rows, *case.shape[1:]), case.dtype))

    torch.set_num_threads(1)
    small, more = (shortest(sized(n).step("ours"), seconds) for n in SIZES)
    torch.set_num_threads(threads)
    whole = sized(LARGE)
    arithmetic = (more - small) / (SIZES[1] - SIZES[0])
    yardstick, ours = (shortest(whole.step(v), 2 * seconds) for v in ("yardstick", "ours"))
    floor = max(arithmetic * LARGE / threads, yardstick)
    return {"arithmetic": arithmetic, "yardstick": yardstick, "floor": floor, "ours": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("ceilings.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of four times a case")
    args = parser.parse_args()
    found = {}
    print(
        f"{'':20}{'ns an element':>15}{'floor / yardstick':>20}{'ours / yardstick':>20}{'ours / floor':>15}"
    )
    for case in CASES:
        if case.title in TITLES:
            t = found[case.title] = measure(case, args.threads, args.seconds)
            ratios = t["floor"] / t["yardstick"], t["ours"] / t["yardstick"], t["ours"] / t["floor"]
            print(
                f"{case.title:20}{1e9 * t['arithmetic']:15.2f}"
                + "{:20.2f}{:20.2f}{:15.2f}".format(*ratios)
            )
    machine = bench.machine(args.threads)
    document = {
        "kind": "ceilings",
        "commit": bench.commit(),
        "torch": torch.__version__,
        "machine": machine,
    }
    args.output.write_text(json.dumps({**document, "results": found}) + "\n")


if __name__ == "__main__":
    main()
