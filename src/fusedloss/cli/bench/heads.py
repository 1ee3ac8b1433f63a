"""`fusedloss bench --linear`: heads whose logits never exist, beside PyTorch and the matrix products alone.

A call runs forward and backward. On the CPU the memory of each variant is taken in a process of its own, and on
one thread the clock is the thread's own time, which other programs do not stretch.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812

import fusedloss

from ...engines.chunks.products import HALVES, multiplies_bfloat16
from ...lazy.tensor import Product, lazy
from ..processes import MEBI, available, in_a_process
from . import cuda as gpu
from . import tables
from .cases import Case
from .cpu import peak_memory, time_case
from .harness import (
    Loader,
    Plan,
    Result,
    Step,
    Work,
    begin,
    difference,
    prepared,
)
from .machine import Run
from .machine import gpu as gpu_machine
from .selection import other_build
from .targets import Target

VARIANTS = ("products", "ours", "lazy", "eager", "torch")
LABELS = {
    "ours": "fusedloss",
    "lazy": "fusedloss, lazy head",
    "eager": "PyTorch",
    "torch": "PyTorch, chunked",
}
COLOURS = {"ours": "#08306b", "lazy": "#4292c6", "eager": "#cb181d", "torch": "#ef8a62"}
PEERS = ("liger", "cut-cross-entropy")
CPU_PEERS = ("auto chunker", "unsloth-zoo", "trl")  # beside the cases of the table, where installed
LONG, FEWEST = 60.0, 2  # a case that has taken so many seconds ends after so many rounds
SAMPLE, SAMPLES = 0.01, 60  # seconds of one and how many, of a small case
GPU_ROUNDS = 5
SLOW_PRODUCTS = "this CPU has no instructions for bfloat16: its products are taken in float32"


# Times the products alone and PyTorch, by type.
AT_MOST = {"float32": {"products": 1.05}, "bfloat16": {"products": 1.25, "eager": 1.0}}
NONE: Mapping[str, float] = {}
SMALL, SMALL_AT_MOST = ((3, 4, 5), (64, 64, 128)), {"eager": 1.3}


def head(
    group: str, n: int, d: int, v: int, dtype: str, at_most: Mapping[str, float] = NONE
) -> Case:
    """Rows, features and classes of a group: table, small, rows, or classes, of which memory alone is taken."""
    words = f"{n} x {d} x {v} {dtype}", "linear_cross_entropy", (n, d, v), dtype
    return Case(*words, group=group, at_most=at_most)


GPU_CASES = (
    head("table", 8192, 4096, 128256, "bfloat16"),
    head("table", 8192, 2304, 256000, "bfloat16"),
    head("table", 16384, 2048, 32000, "bfloat16"),
    head("table", 4096, 2048, 50257, "float32"),
)


def cases(quick: bool) -> list[Case]:
    found = [head("table", 1024, 768, 32000, dtype, most) for dtype, most in AT_MOST.items()]
    found += [head("small", *shape, dtype, SMALL_AT_MOST) for dtype in AT_MOST for shape in SMALL]
    shapes = [("table", 2048, 512, 50257)]
    if quick:
        found += [head(*shape, "float32") for shape in shapes]
    else:
        shapes += [("rows", n, 512, 32000) for n in (256, 1024, 4096, 16384)]
        found += [head(*shape, dtype) for dtype in AT_MOST for shape in shapes]
    thousands = (8, 32, 128) if quick else (8, 32, 64, 128, 256)
    return found + [head("classes", 4096, 512, 1000 * v, "float32") for v in thousands]


def shortest(result: Result, other: str, _: Sequence[Result]) -> float | None:
    return result.shortest_ratio("ours", other)


def targets(results: Sequence[Result]) -> list[Target]:
    """Those of the cases."""
    return [
        Target(f"{r.case.title} / {other}", partial(shortest, r, other), bound)
        for r in results
        for other, bound in r.case.at_most.items()
    ]


def sizes(case: Case) -> tuple[int, int]:
    """Of the logits and of the gradients, in bytes."""
    n, d, v = case.shape
    itemsize = getattr(torch, case.dtype).itemsize
    return n * v * itemsize, (n + v) * d * itemsize


def logits_in_full(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """What torch's linear_cross_entropy does without options; torch has that since 2.13."""
    return F.cross_entropy(F.linear(input, linear_weight), target)


def in_torchs_chunks(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(input, linear_weight, target, options=options)


def with_a_lazy_head(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(lazy(Product(input, linear_weight, None)), target)


class HeadWork(Work):
    """Input, weight and target; `budgets` are of memory, of ours measured with each, too."""

    checked = False  # Eager's would take its time again, and more memory than there may be.
    yardstick = "matrix products"

    def __init__(self, case: Case, device: str = "cpu", budgets: tuple[int, ...] = ()) -> None:
        super().__init__(case, device)
        self.budgets = {f"ours, {budget // MEBI} MiB": budget for budget in budgets}

    def draw(self, generator: Generator) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        n, d, v = self.case.shape
        dtype = getattr(torch, self.case.dtype)
        self.learned = 0, 1
        x = torch.randn(n, d, generator=generator).to(dtype)
        weight = torch.randn(v, d, generator=generator).div_(d**0.5).to(dtype)
        return (x, weight, torch.randint(v, (n,), generator=generator)), {}

    def losses(self) -> Mapping[str, Loader]:
        ours = fusedloss.linear_cross_entropy
        return {
            "ours": lambda: ours,
            **{k: partial(partial, ours, memory_budget=b) for k, b in self.budgets.items()},
            "lazy": lambda: with_a_lazy_head,
            "eager": lambda: logits_in_full,
            "torch": lambda: in_torchs_chunks,
            "liger": liger,
            "cut-cross-entropy": cut_cross_entropy,
            "auto chunker": auto_chunker,
            "unsloth-zoo": unsloth_zoo,
            "trl": trl,
        }

    def step(self, variant: str) -> Step:
        own: dict[str, Step] = {"products": self.products, "forward": self.forward}
        return own.get(variant) or super().step(variant)

    @torch.no_grad()
    def forward(self) -> None:
        fusedloss.linear_cross_entropy(*self.tensors)

    @torch.no_grad()
    def products(self) -> None:
        """What no way around is known: logits, and the gradients of input and weight."""
        x, weight, _ = self.bare
        if self.device == "cpu" and slow_products(x.dtype):
            x, weight = x.float(), weight.float()
        logits = torch.mm(x, weight.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), x)


def liger() -> Callable[..., Tensor]:
    module = importlib.import_module("liger_kernel.transformers")
    criterion = module.LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, y: criterion(w, x, y)


def cut_cross_entropy() -> Callable[..., Tensor]:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x, w, y: function(x, w, y)


def auto_chunker() -> Callable[..., Tensor]:
    """Inductor's, of PyTorch's own logits and loss."""
    chunked: dict[str, Any] = {"auto_chunker.enable": True}
    return torch.compile(logits_in_full, fullgraph=True, dynamic=False, options=chunked)


def unsloth_zoo() -> Callable[..., Tensor]:
    os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")
    module = importlib.import_module("unsloth_zoo.fused_losses.cross_entropy_loss")
    loss = partial(module.unsloth_fused_ce_loss, None, shift_labels=False)
    return lambda x, w, y: loss(x.unsqueeze(0), w, None, y.unsqueeze(0))


def trl() -> Callable[..., Tensor]:
    """As its trainers call it: from the log-probabilities of all tokens."""
    rows = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    size = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda x, w, y: -rows.apply(x, w, None, y, 1.0, size, None, 1.0, ())[0].mean()


def slow_products(dtype: torch.dtype) -> bool:
    return dtype in HALVES and not multiplies_bfloat16()


def why_not(case: Case, variant: str) -> str | None:
    """Why a variant is left out, or None."""
    if variant == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "PyTorch in chunks, which came with torch 2.13 (F.linear_cross_entropy)"
    if variant in ("eager", "torch") and slow_products(getattr(torch, case.dtype)):
        return SLOW_PRODUCTS
    logits, gradients = sizes(case)
    if {"products": 2, "eager": 4}.get(variant, 0) * logits + 6 * gradients > available():
        return "it needs more memory than there is"
    return None


def measure(
    every: Sequence[Case], rounds: int, threads: int, against: str = ""
) -> Iterator[Result]:
    for case in every:
        skipped = {v: why for v in VARIANTS if (why := why_not(case, v))}
        peers = CPU_PEERS if case.group == "table" else ()
        chosen = tuple(v for v in (*VARIANTS, *peers) if v not in skipped)
        try:
            small = case.group == "small"
            measured = (1.0, SAMPLE, FEWEST, SAMPLES) if small else (LONG, 0.0, FEWEST, rounds)
            plan = Plan(chosen, threads, *measured, against, HeadWork)
            if case.group == "classes":
                result, taken = Result(case, gradient_bytes=sizes(case)[1]), chosen
            else:
                result = in_a_process(time_case, case, plan)
                taken = tuple(result.samples)
            for variant in (*LABELS, *peers):
                if variant in taken and not small:
                    result.peaks[variant] = in_a_process(peak_memory, case, variant, plan)
        except (RuntimeError, OSError) as error:
            result = Result(case, skipped={"ours": str(error)})
        result.skipped |= skipped
        yield result


def run(args: argparse.Namespace, threads: int) -> int:
    """Measure and report; 0, or 1 if a case failed."""
    against = other_build(args.against)
    this = Run(threads, 160)
    results: list[Result] = []
    interrupted = False
    try:
        for result in measure(cases(args.quick), 2 if args.quick else 7, threads, against):
            results.append(result)
            this.console.print(f"{result.case.title}: {told(result)}", markup=False)
    except KeyboardInterrupt:
        interrupted = True
    this.console.print(table(results), tables.targets_table(results, targets(results)))
    if beside := peers_table(results):
        this.console.print(beside)
    if against:
        this.console.print(tables.builds_table(results), tables.slowest(results))
    for note in dict.fromkeys(w for r in results for w in r.skipped.values()):
        this.console.print(f"Left out: {note}.", style="yellow", markup=False)
    document = this.document(
        kind="linear",
        quick=args.quick,
        complete=not interrupted,
        results=[row(r) for r in results],
    )
    if args.picture:
        picture(results, args.picture)
    this.write(args.output, document)
    if interrupted:
        return 130
    return int(any("ours" in r.skipped for r in results) or not results)


def row(result: Result) -> dict[str, Any]:
    """A case in the JSON file."""
    case = result.case
    named = zip("ndv", case.shape, strict=True)
    return {
        "case": {"group": case.group, **dict(named), "dtype": case.dtype},
        "samples": result.samples,
        "peaks": result.peaks,
        "skipped": result.skipped,
    }


def table(results: list[Result]) -> Table:
    table = Table(title="forward + backward; memory beyond inputs and gradients, MiB")
    for column in ("case", "ours, ms", "ours / products", "eager / ours", "chunked / ours"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for label in LABELS.values():
        table.add_column(label, justify="right")
    for r in results:
        pairs = (("ours", "products"), ("eager", "ours"), ("torch", "ours"))
        ratios = (number(r.shortest_ratio(*pair), 2) for pair in pairs)
        table.add_row(
            *(r.case.title, milliseconds(r), *ratios, *(number(mebibytes(r, v), 1) for v in LABELS))
        )
    return table


def peers_table(results: Sequence[Result]) -> Table | None:
    """What there is of the peers: how many times our time they take, and their memory."""
    found = [p for p in CPU_PEERS if any(p in r.samples for r in results)]
    if not found:
        return None
    table = Table(title="peers: times our time; MiB beyond inputs and gradients")
    table.add_column("case")
    for peer in found:
        table.add_column(peer, justify="right")
    for r in results:
        if any(p in r.samples for p in found):
            pairs = ((r.shortest_ratio(p, "ours"), mebibytes(r, p)) for p in found)
            cells = (f"{number(ratio, 2)}; {number(memory, 0)}" for ratio, memory in pairs)
            table.add_row(r.case.title, *cells)
    return table


def milliseconds(result: Result) -> str:
    shortest = 1e3 * (result.shortest("ours") or math.nan)
    return number(shortest, 0 if shortest >= 10 else 3)


def told(result: Result) -> str:
    if result.samples:
        return f"{milliseconds(result)} ms"
    return f"{number(mebibytes(result, 'ours'), 0)} MiB" if result.peaks else "failed"


def mebibytes(result: Result, variant: str) -> float | None:
    """Beyond inputs and gradients."""
    beyond = result.beyond(variant)
    return None if beyond is None else beyond / MEBI


def number(value: float | None, digits: int) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def picture(results: Sequence[Result], path: Path) -> None:
    """The memory over the number of classes."""
    from matplotlib.figure import Figure

    points = [r for r in results if r.case.group == "classes" and r.case.dtype == "float32"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for variant, label in LABELS.items():
        xs = [r.case.shape[-1] for r in points if variant in r.peaks]
        ys = [mebibytes(r, variant) or 0.0 for r in points if variant in r.peaks]
        if xs:
            axes.plot(xs, ys, "o-", color=COLOURS[variant], label=label)
    axes.set_xlabel("classes")
    axes.set_ylabel("MiB beside the gradients")
    rows = statistics.mode(r.case.shape[0] for r in points)
    axes.set_title(f"Linear cross entropy of {rows} rows, forward and backward", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def measure_on_gpu(case: Case, device: str, budgets: tuple[int, ...] = ()) -> dict[str, Any]:
    work = HeadWork(case, device, budgets)
    result = begin(work)
    expected: list[Tensor] = []
    differences: dict[str, float] = {}

    def look(variant: str, step: Step) -> None:
        result.peaks[variant] = gpu.peak(step, work)
        if variant == "products":
            return
        outcome = work.outcome(work.losses()[variant]())
        if variant == "eager":
            expected.extend(outcome)
        elif expected:
            differences[variant] = max(map(difference, outcome, expected))

    variants = ("eager", "ours", *work.budgets, *PEERS, "products")
    steps = prepared(work, variants, result, look=look)
    expected.clear()
    result.samples = gpu.interleaved(steps, device, GPU_ROUNDS)
    return {
        "title": case.title,
        "seconds": {k: statistics.median(v) for k, v in result.samples.items()},
        "samples": result.samples,
        "beyond_bytes": {k: result.beyond(k) for k in result.peaks},
        "differences": differences,
        "skipped": result.skipped,
    }


def line(found: dict[str, Any]) -> str:
    parts = [
        f"{k} {1e3 * v:.2f} ms {found['beyond_bytes'][k] / MEBI:.0f} MiB"
        for k, v in found["seconds"].items()
    ]
    return ", ".join([found["title"], *parts, *(f"no {k}" for k in found["skipped"])])


def benchmark(
    keep: Callable[[list[dict[str, Any]]], None],
    left: Callable[[], float],
    dry: bool = False,
    budgets: tuple[int, ...] = (),
    cases: tuple[Case, ...] = GPU_CASES,
) -> list[dict[str, Any]]:
    """Measures on a GPU while there is time `left`, and gives `keep` what there is after each case."""
    device = "cpu" if dry else "cuda"
    results: list[dict[str, Any]] = []

    def one(case: Case) -> dict[str, Any]:
        found = measure_on_gpu(replace(case, shape=(9, 16, 40)) if dry else case, device, budgets)
        print(line(found), flush=True)
        return found

    for case in cases:
        if left() <= 0:
            break
        results.append(gpu.told(case.title, device, one, case))
        keep(results)
    return results


def run_on_gpu(output: Path) -> int:
    """What `fusedloss bench --device cuda --linear` does: 0, 1 where a case failed, 2 without a GPU."""
    if gpu.absent():
        return 2
    about = {"format": 1, "kind": "gpu linear", "machine": gpu_machine("cuda")}
    results = benchmark(lambda r: gpu.write(output, {**about, "linear": r}), lambda: math.inf)
    print(f"Wrote {output}; memory is what is beyond inputs and gradients.")
    return int(any("failed" in r or "ours" in r["skipped"] for r in results))
