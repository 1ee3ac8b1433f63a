"""`fusedloss bench --linear`: heads whose logits never exist, beside PyTorch and the matrix products alone.

A call runs forward and backward. Times of a case are taken in one process, its variants interleaved, and the
memory of each variant in a process of its own. On one thread the clock is the thread's own time, which other
programs do not stretch.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F  # noqa: N812

import fusedloss

from ...engines.chunks.products import HALVES, multiplies_bfloat16
from . import command as bench
from .harness import Step, available, growth, reason, small_pages

MEBI = 2**20
VARIANTS = ("products", "ours", "eager", "torch")
LABELS = {"ours": "fusedloss", "eager": "PyTorch", "torch": "PyTorch, chunked"}
COLOURS = {"ours": "#08306b", "eager": "#cb181d", "torch": "#ef8a62"}
LONG, FEWEST = 60.0, 2  # a case that has taken so many seconds ends after so many rounds
SLOW_PRODUCTS = "this CPU has no instructions for bfloat16: its products are taken in float32"


@dataclass(frozen=True)
class Case:
    group: str  # table, classes or rows
    n: int
    d: int
    v: int
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.n} x {self.d} x {self.v} {self.dtype}"

    @property
    def logits(self) -> int:
        """Bytes."""
        return self.n * self.v * getattr(torch, self.dtype).itemsize

    @property
    def gradients(self) -> int:
        return (self.n + self.v) * self.d * getattr(torch, self.dtype).itemsize


@dataclass
class Result:
    case: Case
    samples: dict[str, list[float]] = field(default_factory=dict)  # seconds of a call
    peaks: dict[str, int] = field(default_factory=dict)  # bytes beyond the inputs
    skipped: dict[str, str] = field(default_factory=dict)

    def best(self, variant: str) -> float | None:
        return min(self.samples[variant]) if self.samples.get(variant) else None

    def ratio(self, variant: str, to: str) -> float | None:
        """Of the shortest times: other programs can only add to a time."""
        a, b = self.best(variant), self.best(to)
        return a / b if a and b else None

    def excess(self, variant: str) -> float | None:
        """MiB beyond inputs and gradients."""
        peak = self.peaks.get(variant)
        return None if peak is None else (peak - self.case.gradients) / MEBI


def cases(quick: bool) -> list[Case]:
    shapes = [("table", 1024, 768, 32000), ("table", 2048, 512, 50257)]
    if quick:
        shapes += [("classes", 512, 256, v) for v in (4096, 16384, 65536)]
        return [Case(*shape, "float32") for shape in shapes]
    shapes += [("classes", 1024, 512, 1000 * v) for v in (4, 16, 64, 128, 256)]
    shapes += [("rows", n, 512, 32000) for n in (256, 1024, 4096, 16384)]
    return [Case(*shape, dtype) for dtype in ("float32", "bfloat16") for shape in shapes]


def logits_in_full(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """What torch's linear_cross_entropy does without options; torch has that since 2.13."""
    return F.cross_entropy(F.linear(input, linear_weight), target)


class Work:
    """The tensors of a case, and its variants as calls without arguments."""

    def __init__(self, case: Case) -> None:
        dtype = getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(case.n, case.d, generator=generator).to(dtype).requires_grad_()
        weight = torch.randn(case.v, case.d, generator=generator).div_(case.d**0.5)
        self.weight = weight.to(dtype).requires_grad_()
        self.target = torch.randint(case.v, (case.n,), generator=generator)

    def step(self, variant: str) -> Step:
        if variant == "products":
            return self.products
        if variant == "forward":
            return self.forward
        loss: Callable[..., torch.Tensor] = fusedloss.linear_cross_entropy
        options = {}
        if variant == "eager":
            loss = logits_in_full
        if variant == "torch":
            loss = F.linear_cross_entropy
            options = {"options": torch.nn.LinearCrossEntropyOptions()}

        def step() -> None:
            loss(self.x, self.weight, self.target, **options).backward()
            self.x.grad = self.weight.grad = None

        return step

    @torch.no_grad()
    def forward(self) -> None:
        fusedloss.linear_cross_entropy(self.x, self.weight, self.target)

    @torch.no_grad()
    def products(self) -> None:
        """What no way around is known: logits, and the gradients of input and weight."""
        x, weight = self.x, self.weight
        if slow_products(x.dtype):
            x, weight = x.float(), weight.float()
        logits = torch.mm(x, weight.t())
        torch.mm(logits, weight)
        torch.mm(logits.t(), x)


def slow_products(dtype: torch.dtype) -> bool:
    return dtype in HALVES and not multiplies_bfloat16()


def why_not(case: Case, variant: str) -> str | None:
    """Why a variant is left out, or None."""
    if variant == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "an older torch"
    if variant in ("eager", "torch") and slow_products(getattr(torch, case.dtype)):
        return SLOW_PRODUCTS
    copies = {"products": 2, "eager": 4}.get(variant, 0)
    if copies * case.logits + 6 * case.gradients > available():
        return "it needs more memory than there is"
    return None


def time_case(case: Case, rounds: int, threads: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    work = Work(case)
    steps = {v: work.step(v) for v in VARIANTS if why_not(case, v) is None}
    samples: dict[str, list[float]] = {v: [] for v in steps}
    begun = time.perf_counter()
    for done in range(rounds + 1):
        if done > FEWEST and time.perf_counter() - begun > LONG:
            break
        for variant, step in steps.items():
            start = clock()
            step()
            if done:  # the first round warms up
                samples[variant].append(clock() - start)
    return samples


def peak(case: Case, variant: str, threads: int) -> int:
    """The most resident memory of one call, in bytes beyond what is resident before it."""
    torch.set_num_threads(threads)
    small_pages()
    Work(Case(case.group, 64, 64, 512, case.dtype)).step(variant)()  # starts the threads
    return growth(Work(case).step(variant))


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns in a process of its own. RuntimeError where that fails."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    try:
        error, answer = ours.recv()
    except EOFError:
        process.join()
        error, answer = f"its process ended with exit code {process.exitcode}", None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if error:
        raise RuntimeError(error)
    return answer


def _answer(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    try:
        pipe.send((None, function(*args)))
    except Exception as error:
        pipe.send((reason(error), None))


def measure(
    every: list[Case], rounds: int, threads: int, run: Callable[..., Any] = in_a_process
) -> Iterator[Result]:
    for case in every:
        result = Result(case)
        result.skipped = {v: why for v in VARIANTS if (why := why_not(case, v))}
        try:
            result.samples = run(time_case, case, rounds, threads)
            for variant in LABELS:
                if variant not in result.skipped:
                    result.peaks[variant] = run(peak, case, variant, threads)
        except (RuntimeError, OSError) as error:
            result.skipped["ours"] = str(error)
        yield result


def run(args: argparse.Namespace, threads: int) -> int:
    """Measure and report; 0, or 1 if a case failed."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    started = time.perf_counter()
    here = bench.machine(threads)
    console.print(bench.headline(here), style="dim", markup=False)
    results: list[Result] = []
    interrupted = False
    try:
        for result in measure(cases(args.quick), 2 if args.quick else 7, threads):
            results.append(result)
            best = number((result.best("ours") or math.nan) * 1e3, 0) or "failed"
            console.print(f"{result.case.title}, ms: {best}", markup=False)
    except KeyboardInterrupt:
        interrupted = True
    console.print(table(results))
    for note in dict.fromkeys(w for r in results for w in r.skipped.values()):
        console.print(f"Left out: {note}.", style="yellow", markup=False)
    document = {
        "format": 1,
        "kind": "linear",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fusedloss": {"version": fusedloss.__version__, "commit": bench.commit()},
        "torch": torch.__version__,
        "machine": here,
        "quick": args.quick,
        "complete": not interrupted,
        "seconds": round(time.perf_counter() - started),
        "results": [asdict(r) for r in results],
    }
    args.output.write_text(json.dumps(document, allow_nan=False) + "\n")
    if args.picture:
        picture(document, args.picture)
    console.print(f"Wrote {args.output} after {document['seconds']} s.")
    if interrupted:
        return 130
    return int(any("ours" in r.skipped for r in results) or not results)


def table(results: list[Result]) -> Table:
    table = Table(title="forward + backward; memory beyond inputs and gradients, MiB")
    for column in ("case", "ours, ms", "ours / products", "eager / ours", "chunked / ours"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for label in LABELS.values():
        table.add_column(label, justify="right")
    for r in results:
        best = r.best("ours")
        table.add_row(
            r.case.title,
            number(best and best * 1e3, 0),
            number(r.ratio("ours", "products"), 2),
            number(r.ratio("eager", "ours"), 2),
            number(r.ratio("torch", "ours"), 2),
            *(number(r.excess(v), 1) for v in LABELS),
        )
    return table


def number(value: float | None, digits: int) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def picture(document: dict[str, Any], path: Path) -> None:
    """The memory over the number of classes."""
    from matplotlib.figure import Figure

    results = [Result(**{**r, "case": Case(**r["case"])}) for r in document["results"]]
    points = [r for r in results if r.case.group == "classes" and r.case.dtype == "float32"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for variant, label in LABELS.items():
        xs = [r.case.v for r in points if variant in r.peaks]
        ys = [r.excess(variant) or 0.0 for r in points if variant in r.peaks]
        axes.plot(xs, ys, "o-", color=COLOURS[variant], label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("classes")
    axes.set_ylabel("MiB beside the gradients")
    rows = statistics.mode(r.case.n for r in points)
    axes.set_title(f"Linear cross entropy of {rows} rows, forward and backward", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
