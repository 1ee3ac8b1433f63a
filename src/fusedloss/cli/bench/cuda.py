"""`fusedloss bench --device cuda`: times by CUDA events, and bytes a second beside a copy's.

On a machine without a GPU, `dry=True` goes through the same steps at tiny shapes, interpreted.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedloss

from ...engines import gpu
from .cases import LOGITS, MEBI, Case, learned, yardstick
from .harness import difference

Step = Callable[[], object]

SAMPLE = 2e-3  # seconds, the shortest
ROUNDS = 15
WIDEST_ERROR = {"float32": 1e-4, "bfloat16": 0.01}
TRIPLET = "triplet_margin_loss"
CE = "cross_entropy"
SOFT = "cross_entropy[probabilities]"
SMALL = ("mse_loss", "binary_cross_entropy", LOGITS, "kl_div", CE, "nll_loss", TRIPLET)

# In the order in which they are wanted; torch.compile, which takes seconds, where `quick_compile` is set.
CASES = (
    Case("CE 8192x128256 bf16", CE, (8192, 128256), "bfloat16", quick_compile=True),
    Case("CE 32768x32768 bf16", CE, (32768, 32768), "bfloat16", quick_compile=True),
    Case("MSE 64M", "mse_loss", (64, MEBI), quick_compile=True),
    Case("MSE 64M bf16", "mse_loss", (64, MEBI), "bfloat16"),
    Case("BCE with logits 64M", LOGITS, (64, MEBI), quick_compile=True),
    Case("BCE with logits 64M bf16", LOGITS, (64, MEBI), "bfloat16"),
    Case("KL 8192x32000", "kl_div", (8192, 32000), quick_compile=True),
    Case("KL 8192x32000 bf16", "kl_div", (8192, 32000), "bfloat16"),
    Case("CE 16x21x512x512", CE, (16, 21, 512, 512), quick_compile=True),
    Case("CE 16x21x512x512 bf16", CE, (16, 21, 512, 512), "bfloat16"),
    Case("triplet 65536x512", TRIPLET, (65536, 512), quick_compile=True),
    Case("triplet 65536x512 bf16", TRIPLET, (65536, 512), "bfloat16"),
    Case("CE 8192x32000", CE, (8192, 32000)),
    Case("CE 8192x32000 bf16", CE, (8192, 32000), "bfloat16"),
    Case("CE smoothing 8192x32000 bf16", CE, (8192, 32000), "bfloat16", "label_smoothing"),
    Case("CE probabilities 8192x32000 bf16", SOFT, (8192, 32000), "bfloat16"),
    Case("CE 65536x1024", CE, (65536, 1024)),
    Case("CE 1048576x21", CE, (1048576, 21)),
    Case("BCE 64M", "binary_cross_entropy", (64, MEBI)),
    Case("BCE 64M bf16", "binary_cross_entropy", (64, MEBI), "bfloat16"),
    Case("NLL 65536x1024", "nll_loss", (65536, 1024)),
    *(Case(f"{loss} 3x5", loss, (3, 5), group="small") for loss in SMALL),
)


@dataclass
class Measured:
    """What was measured of a case. Times are of forward and backward together, in seconds."""

    case: Case
    bytes: int  # the inputs read once and the gradients written once
    samples: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    beyond: dict[str, int] = field(
        default_factory=dict
    )  # bytes of memory beyond inputs and gradients
    kernels: dict[str, int] = field(default_factory=dict)  # launched, where the case is small
    difference: float | None = None  # from eager, relative to the largest entry
    wrong: bool = False

    def median(self, variant: str) -> float | None:
        return statistics.median(self.samples[variant]) if variant in self.samples else None

    def rate(self, variant: str = "ours") -> float | None:
        """In GB/s."""
        seconds = self.median(variant)
        return seconds and self.bytes / seconds / 1e9

    def to_json(self) -> dict[str, Any]:
        case = self.case
        medians = {k: float(f"{self.median(k) or 0:.4g}") for k in self.samples}
        return {
            "title": case.title,
            "loss": case.loss,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "option": case.option,
            "bytes": self.bytes,
            "seconds": medians,
            "samples": {k: [float(f"{s:.4g}") for s in v] for k, v in self.samples.items()},
            "gb_per_s": {k: self.bytes / v / 1e9 for k, v in medians.items() if v},
            "beyond_bytes": self.beyond,
            "kernels": self.kernels,
            "skipped": self.skipped,
            "difference": self.difference,
            "wrong": self.wrong,
        }


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sample(step: Step, calls: int, device: str) -> float:
    """The mean time of a call, by the device's own clock."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(calls):
        step()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / calls


def interleaved(steps: dict[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    """Rounds of one sample of each: what slows the machine slows all."""
    shortest = SAMPLE if device == "cuda" else 0.0
    calls = {k: max(1, round(shortest / max(sample(s, 3, device), 1e-7))) for k, s in steps.items()}
    samples: dict[str, list[float]] = {k: [] for k in steps}
    gc.collect()
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(sample(step, calls[name], device))
    return samples


class Work:
    """The tensors of a case on the device, and its variants as calls without arguments."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            drawn = case.row.example(case.shape, getattr(torch, case.dtype), generator)
            self.settings = case.settings(drawn, generator)
        self.tensors = tuple(drawn)
        self.leaves = [self.tensors[k].requires_grad_() for k in learned(case.row)]
        self.bytes = sum(t.nbytes for t in (*self.tensors, *self.leaves))

    def differentiate(self, function: Callable[..., Tensor]) -> Step:
        def step() -> None:
            function(*self.tensors, **self.settings).backward()
            for leaf in self.leaves:
                leaf.grad = None

        return step

    def steps(self, compiles: bool) -> Iterator[tuple[str, Callable[[], Step]]]:
        row, bare = self.case.row, tuple(t.detach() for t in self.tensors)
        yield "ours", lambda: self.differentiate(row.function)
        yield "eager", lambda: self.differentiate(row.torch_function)
        if compiles:
            torch._dynamo.reset()
            yield "compile", lambda: self.differentiate(torch.compile(row.torch_function))
        rod = yardstick(row, bare)
        yield "yardstick", lambda: lambda: rod.fresh(*bare)
        if self.device == "cuda":
            yield "ours, graph", lambda: self.graphed(row.function)
            yield "eager, graph", lambda: self.graphed(row.torch_function)
        for name, peer in PEERS.items():
            if (found := peer(self.case)) is not None:
                yield name, lambda found=found: self.differentiate(found())  # type: ignore[misc]

    def outcome(self, function: Callable[..., Tensor], dtype: str | None = None) -> list[Tensor]:
        """The loss and its gradients; with `dtype`, those of the same values in that type."""
        tensors = self.tensors
        if dtype:
            wide = getattr(torch, dtype)
            tensors = tuple(
                t.detach().to(wide).requires_grad_(t.requires_grad) if t.is_floating_point() else t
                for t in tensors
            )
        value = function(*tensors, **self.settings)
        leaves = [t for t in tensors if t.requires_grad]
        return [value.detach(), *torch.autograd.grad(value, leaves)]

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


Loader = Callable[[], Callable[..., Tensor]]


def liger(case: Case) -> Loader | None:
    """Writes its gradient over the logits: the values change from call to call, the work does not."""
    if case.loss == CE and not case.option and len(case.shape) == 2:

        def load() -> Callable[..., Tensor]:
            module = importlib.import_module("liger_kernel.transformers")
            criterion = module.LigerCrossEntropyLoss()
            # It refuses to write over a leaf.
            return lambda x, y, **_: criterion(x.view_as(x), y)

        return load
    if case.loss == "kl_div":

        def load_kl() -> Callable[..., Tensor]:
            module = importlib.import_module("liger_kernel.transformers")
            criterion = module.LigerKLDIVLoss(reduction="batchmean")
            return lambda x, t, **_: criterion(x, t)

        return load_kl
    return None


def quack(case: Case) -> Loader | None:
    if case.loss != CE or case.option or len(case.shape) != 2:
        return None

    def load() -> Callable[..., Tensor]:
        function = importlib.import_module("quack.cross_entropy").cross_entropy
        return lambda x, y, **_: function(x, y, reduction="mean")

    return load


# Cut-cross-entropy has no loss of logits: it is among the peers of the linear losses.
PEERS = {"quack": quack, "liger": liger}


def measure(case: Case, device: str, compiles: bool, rounds: int = ROUNDS) -> Measured:
    work = Work(case, device)
    result = Measured(case, work.bytes)
    compare(work, result)
    steps: dict[str, Step] = {}
    for name, make in work.steps(compiles and case.quick_compile):
        try:
            step = make()
            for _ in range(3):
                step()
            settle(device)
            result.beyond[name] = beyond(step, work.leaves, device)
            steps[name] = step
        except Exception as error:
            lines = str(error).splitlines() or [""]
            result.skipped[name] = f"{type(error).__name__}: {lines[0]}"[:200]
    if case.group == "small":
        for name in ("ours", "eager"):
            result.kernels[name] = kernels(steps[name], device)
    result.samples = interleaved(steps, device, rounds)
    return result


def compare(work: Work, result: Measured) -> None:
    """Before peers write over the inputs. Eager rounds half types on the way: there float32 is the measure."""
    wide = "float32" if work.case.dtype == "bfloat16" else None
    ours = work.outcome(work.case.row.function)
    theirs = work.outcome(work.case.row.torch_function, wide)
    result.difference = max(difference(a, b) for a, b in zip(ours, theirs, strict=True))
    result.wrong = not result.difference <= WIDEST_ERROR[work.case.dtype]


def beyond(step: Step, leaves: list[Tensor], device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    settle(device)
    gradients = sum(leaf.nbytes for leaf in leaves)
    return torch.cuda.max_memory_allocated() - before - gradients


def kernels(step: Step, device: str) -> int:
    """How many kernels a call launches."""
    if device != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        settle(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    names = [e.name for e in profile.events() if e.device_type == on_gpu]
    return sum(not n.startswith(("Memcpy", "Memset")) for n in names)


def copy_rate(device: str, size: int) -> float:
    """Bytes a second, read and written, of a large clone."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    samples = interleaved({"clone": lambda: x.clone()}, device, 9)["clone"]
    return 2 * size / statistics.median(samples)


def machine(device: str) -> dict[str, Any]:
    import triton

    about: dict[str, Any] = {
        "fusedloss": fusedloss.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "the interpreter",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "capability": torch.cuda.get_device_capability(0),
        }
    return about


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
    document: dict[str, Any] = {
        "machine": machine(device),
        "copy_gb_per_s": copy_rate(device, 1 << (16 if dry else 31)) / 1e9,
        "results": [],
        "left_out": [],
    }
    results: list[dict[str, Any]] = document["results"]
    plan = [(c, False) for c in cases] + [(c, True) for c in cases if c.quick_compile and not dry]
    for case, compiles in plan:
        title = case.title + ", with compile" * compiles
        if time.perf_counter() - start > seconds:
            document["left_out"].append(title)
            continue
        try:
            found = measure(small(case) if dry else case, device, compiles, 2 if dry else ROUNDS)
        except Exception as error:
            results.append({"title": title, "failed": f"{type(error).__name__}: {error}"[:500]})
        else:
            results.append({**found.to_json(), "title": title})
            print(line(title, found, document["copy_gb_per_s"]), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        keep(document)
    keep(document)
    return document


def line(title: str, found: Measured, copy: float) -> str:
    times = ", ".join(f"{k} {1e6 * (found.median(k) or 0):.0f} us" for k in found.samples)
    rate = found.rate() or 0.0
    wrong = f", NOT eager's result: {found.difference}" if found.wrong else ""
    return f"{title}: {times}; ours {rate:.0f} GB/s, {100 * rate / copy:.0f} % of a copy{wrong}"


def absent() -> bool:
    """Whether there are no GPU kernels to measure, and says why."""
    why = gpu.problem() if torch.cuda.is_available() else "torch finds no GPU"
    if why:
        print(f"fusedloss bench: --device cuda: {why}")
    return why is not None


def run(output: Path, losses: tuple[str, ...] | None = None) -> int:
    """What `fusedloss bench --device cuda` does: 0, 1 for a wrong result, 2 without a GPU."""
    if absent():
        return 2
    cases = tuple(c for c in CASES if losses is None or c.loss in losses)
    document = benchmark(lambda d: write(output, d), float("inf"), cases=cases)
    print(f"Wrote {output}; a copy moves {document['copy_gb_per_s']:.0f} GB/s.")
    return int(any(r.get("wrong") or "failed" in r for r in document["results"]))


def write(output: Path, document: dict[str, Any]) -> None:
    output.write_text(json.dumps(document, indent=1) + "\n")
