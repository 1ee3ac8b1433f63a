"""`fusedloss bench --device cuda`: times by CUDA events, and bytes a second beside a copy's.

On a machine without a GPU, `dry=True` goes through the same steps at tiny shapes, interpreted.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engines import gpu
from .cases import GPU_CASES, Case
from .harness import (
    Loader,
    Plan,
    Result,
    Sampler,
    Step,
    Work,
    begin,
    compare,
    interleave,
    prepared,
    wall,
)
from .machine import gpu as machine

ROUNDS = 15
CASES = GPU_CASES


class GpuWork(Work):
    """With what runs on a GPU alone: graphs of CUDA, and the kernels of others."""

    def losses(self) -> Mapping[str, Loader]:
        peers = ((name, peer(self.case)) for name, peer in PEERS.items())
        return {**super().losses(), **{name: load for name, load in peers if load}}

    def variants(self, compiles: bool) -> list[str]:
        graphs = ["ours, graph", "eager, graph"] if self.device == "cuda" else []
        peers = [name for name in PEERS if name in self.losses()]
        return ["ours", "eager", *["compile"] * compiles, "yardstick", *graphs, *peers]

    def step(self, variant: str) -> Step:
        name, _, how = variant.partition(", ")
        return self.graphed(self.losses()[name]()) if how == "graph" else super().step(variant)

    def graphed(self, function: Callable[..., Tensor]) -> Step:
        """Forward and backward as a graph of CUDA, which the host only has to start."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.outcome(function)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outcome(function)
        return graph.replay


def liger(case: Case) -> Loader | None:
    """Writes its gradient over the logits: the values change from call to call, the work does not."""

    def module() -> Any:
        return importlib.import_module("liger_kernel.transformers")

    def cross_entropy() -> Callable[..., Tensor]:
        criterion = module().LigerCrossEntropyLoss()
        # It refuses to write over a leaf.
        return lambda x, y, **_: criterion(x.view_as(x), y)

    def kl_div() -> Callable[..., Tensor]:
        criterion = module().LigerKLDIVLoss(reduction="batchmean")
        return lambda x, t, **_: criterion(x, t)

    return cross_entropy if of_logits(case) else kl_div if case.loss == "kl_div" else None


def quack(case: Case) -> Loader | None:
    def load() -> Callable[..., Tensor]:
        function = importlib.import_module("quack.cross_entropy").cross_entropy
        return lambda x, y, **_: function(x, y, reduction="mean")

    return load if of_logits(case) else None


def of_logits(case: Case) -> bool:
    return case.loss == "cross_entropy" and not case.option and len(case.shape) == 2


# Cut-cross-entropy has no loss of logits: it is among the peers of the linear losses.
PEERS = {"quack": quack, "liger": liger}


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def events(step: Step, calls: int) -> float:
    """The mean time of a call, by the device's own clock."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(calls):
        step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / calls


def interleaved(steps: Mapping[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    on_gpu = device == "cuda"
    clock: Callable[[Step, int], float] = events if on_gpu else wall
    samplers: dict[str, Sampler] = {name: partial(clock, step) for name, step in steps.items()}
    plan = Plan((), 0, 0.0, 2e-3 if on_gpu else 0.0, rounds, rounds)
    return interleave(samplers, plan)[0]


def measure(case: Case, device: str, compiles: bool, rounds: int = ROUNDS) -> dict[str, Any]:
    work = GpuWork(case, device)
    result, kernels = begin(work), dict[str, int]()
    # Before peers write over the inputs.
    compare(work, work.outcome(case.row.function), result)

    def look(variant: str, step: Step) -> None:
        result.peaks[variant] = peak(step, work)
        if case.group == "small" and variant in ("ours", "eager"):
            kernels[variant] = launched(step, device)

    steps = prepared(work, work.variants(compiles and case.quick_compile), result, look=look)
    result.samples = interleaved(steps, device, rounds)
    return row(result, kernels)


def peak(step: Step, work: Work) -> int:
    """The most memory of a call, in bytes beyond what is allocated before it."""
    if work.device != "cuda":
        return sum(leaf.nbytes for leaf in work.leaves)
    settle(work.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    settle(work.device)
    return torch.cuda.max_memory_allocated() - before


def launched(step: Step, device: str) -> int:
    """How many kernels a call launches."""
    if device != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        settle(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    names = [e.name for e in profile.events() if e.device_type == on_gpu]
    return sum(not n.startswith(("Memcpy", "Memset")) for n in names)


def row(result: Result, kernels: dict[str, int]) -> dict[str, Any]:
    """A case in the JSON file. Times are of forward and backward together, in seconds."""
    case = result.case
    size = result.input_bytes + result.gradient_bytes  # read once and written once
    medians = {k: float(f"{result.median(k) or 0:.4g}") for k in result.samples}
    return {
        "title": case.title,
        "loss": case.loss,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "option": case.option,
        "bytes": size,
        "seconds": medians,
        "samples": {k: [float(f"{s:.4g}") for s in v] for k, v in result.samples.items()},
        "gb_per_s": {k: size / v / 1e9 for k, v in medians.items() if v},
        "beyond_bytes": {k: result.beyond(k) for k in result.peaks},
        "kernels": kernels,
        "skipped": result.skipped,
        "difference": result.difference,
        "wrong": result.wrong,
    }


def copy_rate(device: str, size: int) -> float:
    """Bytes a second, read and written, of a large clone."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    samples = interleaved({"clone": lambda: x.clone()}, device, 9)["clone"]
    return 2 * size / sorted(samples)[len(samples) // 2]


def small(case: Case) -> Case:
    return replace(case, shape=tuple(min(n, 3) for n in case.shape))


def benchmark(
    keep: Callable[[dict[str, Any]], None],
    seconds: float,
    dry: bool = False,
    cases: tuple[Case, ...] = CASES,
) -> dict[str, Any]:
    """Measures until `seconds` are over, and gives `keep` what there is after each case.

    First every case without torch.compile, then those with it.
    """
    device, start = "cpu" if dry else "cuda", time.perf_counter()
    rate = copy_rate(device, 1 << (16 if dry else 31)) / 1e9
    document: dict[str, Any] = {"machine": machine(device), "copy_gb_per_s": rate}
    left_out: list[str] = []
    results: list[dict[str, Any]] = []
    document |= {"results": results, "left_out": left_out}

    def one(title: str, case: Case, compiles: bool) -> dict[str, Any]:
        found = measure(small(case) if dry else case, device, compiles, 2 if dry else ROUNDS)
        print(line(title, found, rate), flush=True)
        return found

    plan = [(c, False) for c in cases] + [(c, True) for c in cases if c.quick_compile and not dry]
    for case, compiles in plan:
        title = case.title + ", with compile" * compiles
        if time.perf_counter() - start > seconds:
            left_out.append(title)
            continue
        results.append(told(title, device, one, title, case, compiles))
        keep(document)
    keep(document)
    return document


def told(
    title: str, device: str, measured: Callable[..., dict[str, Any]], *args: Any
) -> dict[str, Any]:
    """What was measured under its title, or why not."""
    try:
        return {**measured(*args), "title": title}
    except Exception as error:
        return {"title": title, "failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def line(title: str, found: dict[str, Any], copy: float) -> str:
    times = ", ".join(f"{k} {1e6 * v:.0f} us" for k, v in found["seconds"].items())
    rate = found["gb_per_s"].get("ours", 0.0)
    wrong = f", NOT eager's result: {found['difference']}" if found["wrong"] else ""
    return f"{title}: {times}; ours {rate:.0f} GB/s, {100 * rate / copy:.0f} % of a copy{wrong}"


def absent() -> bool:
    """Whether there are no GPU kernels to measure, and says why."""
    why = gpu.problem() if torch.cuda.is_available() else "torch finds no GPU"
    if why:
        print(f"fusedloss bench: --device cuda: {why}")
    return why is not None


def run(output: Path, losses: Iterable[str]) -> int:
    """What `fusedloss bench --device cuda` does: 0, 1 for a wrong result, 2 without a GPU."""
    if absent():
        return 2
    cases = tuple(c for c in CASES if c.loss in losses)
    document = benchmark(lambda d: write(output, d), float("inf"), cases=cases)
    print(f"Wrote {output}; a copy moves {document['copy_gb_per_s']:.0f} GB/s.")
    return int(any(r.get("wrong") or "failed" in r for r in document["results"]))


def write(output: Path, document: dict[str, Any]) -> None:
    output.write_text(json.dumps(document, indent=1) + "\n")
