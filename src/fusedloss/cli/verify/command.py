"""`fusedloss verify`: every loss, type and path against 50 digits, with PyTorch beside it.

The method is explained in docs/accuracy.md, whose table this command writes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ... import __version__
from ...core import reduce
from ...front.definition import REGISTRY, Loss
from ...kinds.ctc import CtcCall
from ...kinds.dice import DiceCall
from ...kinds.heads import LinearCall
from ...kinds.pointwise import PointwiseCall
from ...kinds.reduction import ReductionCall
from ..arguments import UsageError, among, check_writable, chosen_losses
from ..bench.tables import new_table, short
from . import exact, measured, overlaps
from .arguments import DTYPES
from .heads import heads
from .measured import PYTORCH, SUM_BOUND, TRITON, Errors, Path, Sum
from .probes import Probe, probes
from .sequences import sequences

QUICK = ("float32", "bfloat16")
QUANTITIES = ("value", "gradient")
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"


@dataclass(frozen=True)
class Row:
    """One quantity of one loss in one type by one path; errors are in ulps."""

    loss: str
    dtype: str
    quantity: str
    path: str
    greatest: float
    tail: float  # the 99.9th percentile
    count: int
    bound: float | None  # PyTorch has none
    exceeded: int  # how many are beyond it
    worst: str


# The probes are of unreduced losses.
VERIFIED = [key for key, row in REGISTRY.items() if "none" in (row.reductions or ("none",))]


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False)
    try:
        keys = chosen_losses(args.only, VERIFIED)
        names = among("--dtype", args.dtype, tuple(DTYPES)) or (
            QUICK if args.quick else tuple(DTYPES)
        )
        for option in ("json", "markdown", "picture"):
            if file := getattr(args, option):
                check_writable(f"--{option}", file)
        if args.markdown:
            around_table(args.markdown)
    except UsageError as error:
        console.print(f"fusedloss verify: {error}", markup=False)
        return 2
    if args.picture:
        from .picture import draw

        draw(args.picture)
        return 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the results are the same, and many small calls are faster
    try:
        rows, sums = measure(keys, [DTYPES[n] for n in names], args.quick, console)
    finally:
        torch.set_num_threads(threads)
    out = Console(highlight=False)
    for each in tables(rows, sums):
        out.print(each)
        out.print()
    if args.json:
        args.json.write_text(document(rows, sums))
    if args.markdown:
        write_table(args.markdown, rows, sums)
    broken = [
        f"{r.loss}, {r.dtype}, {r.quantity}, {r.path}: {r.exceeded} of {r.count} beyond {r.bound:g} ulp, "
        f"the worst {figure(r.greatest)} ulp at {r.worst}"
        for r in rows
        if r.exceeded
    ]
    broken += [
        f"{s.loss}, {s.dtype}, {s.reduction} of {s.terms:,} terms, {s.path}: {figure(s.error)} ulp, beyond "
        f"{s.bound:g}"
        for s in sums
        if s.bound is not None and not s.error <= s.bound
    ]
    for line in broken:
        out.print(line, markup=False, style="red", soft_wrap=True)
    if not broken:
        out.print("Every error is within its bound.", style="green")
    return 1 if broken else 0


def measure(
    keys: Sequence[str], dtypes: Sequence[torch.dtype], quick: bool, console: Console
) -> tuple[list[Row], list[Sum]]:
    count, repeat = (60, 1) if quick else (1200, 64)
    every = [
        probe
        for key in keys
        for dtype in dtypes
        for probe in probes(
            key, dtype, count if dtype in (torch.float32, torch.float64) else count // 3
        )
    ]
    calls = [measured.captured(probe) for probe in every]
    chosen = [(p, c) for p, c in zip(every, calls, strict=True) if c is not None]
    given = [p for p, _ in chosen]
    paths = measured.paths(every=not quick)
    bar = Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with tempfile.TemporaryDirectory() as name, bar:
        folder, request = File(name), (given, keys, repeat)
        started = {p.name: measured.start(p, folder, request) for p in paths if p.environment}
        step = bar.add_task("50 digits", total=sum(p.tensors[0].numel() for p in given))
        exactly = []
        for probe, (call, tensors) in chosen:
            exactly.append(expected(probe, call, tensors))
            bar.advance(step, probe.tensors[0].numel())
        rows: list[Row] = []
        sums: list[Sum] = []
        for path in paths:
            step = bar.add_task(path.name, total=len(given) + 2 * len(keys))

            def tick(step: Any = step) -> None:
                bar.advance(step)

            if path.name in started:
                answers, totals = measured.finish(path, folder, started[path.name])
                bar.update(step, completed=len(given) + 2 * len(keys))
            else:
                answers = measured.answers(given, path, tick)
                totals = measured.sums(keys, path, repeat, tick)
            rows += judged(given, exactly, answers, path)
            sums += totals
    return rows, sums


def expected(probe: Probe, call: Any, tensors: Sequence[Any]) -> list[exact.Exact]:
    """What a path answers: of a formula's gradients, those by the arguments that receive any."""
    value, *gradients = reference(call, tensors)
    if isinstance(call, PointwiseCall | ReductionCall):
        gradients = [gradients[k] for k in probe.registered.differentiable]
    return [value, *gradients]


def reference(call: Any, tensors: Sequence[Any]) -> list[exact.Exact]:
    if isinstance(call, LinearCall):
        # 1 - p has digits down to the smallest number.
        with exact.mp.workdps(350 if tensors[0].dtype is torch.float64 else exact.mp.dps):
            return heads(call, tensors)
    if isinstance(call, CtcCall):
        with exact.mp.workdps(exact.mp.dps):
            return sequences(call, tensors)
    if isinstance(call, DiceCall):
        return overlaps.reference(call, tensors)
    return exact.reference(call, tensors)


def judged(
    given: Sequence[Probe],
    exactly: Sequence[list[exact.Exact]],
    answers: Sequence[measured.Answer],
    path: Path,
) -> Iterator[Row]:
    found: dict[tuple[str, str, str], Errors] = {}
    for probe, want, answer in zip(given, exactly, answers, strict=True):
        compute = reduce.wide(*(t for t in probe.tensors if t.is_floating_point()))
        for how, results in answer:
            where = f"{probe.option}, {probe.kind}, {how}"
            for k, result in enumerate(results):
                if result is None:
                    continue
                quantity = QUANTITIES[min(k, 1)]
                limit = bound(probe.registered, compute, quantity, path)
                key = probe.loss, str(probe.dtype).removeprefix("torch."), quantity
                errors = found.setdefault(key, Errors())
                errors.add(result, want[k], math.inf if limit is None else limit, compute, where)
    for (loss, dtype, quantity), errors in found.items():
        limit = bound(
            REGISTRY[loss], reduce.wide(torch.empty(0, dtype=DTYPES[dtype])), quantity, path
        )
        yield Row(
            *(loss, dtype, quantity, path.name, errors.greatest, errors.tail, errors.count),
            *(limit, errors.exceeded, errors.worst[1]),
        )


def bound(loss: Loss, compute: torch.dtype, quantity: str, path: Path) -> float | None:
    """What the registry states; half types are computed in float32, then rounded once."""
    if path is PYTORCH:
        return None
    kind = (
        "formula"
        if path.name == "formula"
        else "float64"
        if compute is torch.float64
        else "float32"
    )
    if path.name == TRITON and kind == "float32" and loss.bounds.triton:
        kind = "triton"
    return float(getattr(loss.bounds, kind)[QUANTITIES.index(quantity)])


def figure(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    if value < 1e4:
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def cells(
    rows: Sequence[Row], paths: Sequence[str]
) -> Iterator[tuple[str, str, str, list[Row | None]]]:
    """Loss, type and quantity, and the rows of them by path."""
    by = {(r.loss, r.dtype, r.quantity, r.path): r for r in rows}
    for loss, dtype, quantity in dict.fromkeys((r.loss, r.dtype, r.quantity) for r in rows):
        yield loss, dtype, quantity, [by.get((loss, dtype, quantity, path)) for path in paths]


def tables(rows: Sequence[Row], sums: Sequence[Sum]) -> Iterator[Any]:
    paths = list(dict.fromkeys(r.path for r in rows))

    def table(title: str, *columns: str) -> Any:
        made = new_table(title)
        for name in columns:
            made.add_column(name, no_wrap=True)
        for path in paths:
            made.add_column(path, justify="right", no_wrap=True)
        return made

    for wanted in QUANTITIES:
        errors = table(
            f"Errors of the {wanted}, in ulps: greatest, 99.9th percentile", "loss", "dtype"
        )
        for loss, dtype, quantity, found in cells(rows, paths):
            if quantity == wanted:
                errors.add_row(brief(loss), dtype, *(map(cell, found)))
        yield errors
    totals = table(
        "Sums against the exact sum of their terms, in ulps", "loss", "dtype", "", "terms"
    )
    by = {(s.loss, s.dtype, s.reduction, s.path): s for s in sums}
    for loss, dtype, reduction in dict.fromkeys((s.loss, s.dtype, s.reduction) for s in sums):
        each = [by[loss, dtype, reduction, path] for path in paths]
        terms = f"{each[0].terms:,}"
        totals.add_row(brief(loss), dtype, reduction, terms, *(figure(s.error) for s in each))
    yield totals


def cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return ("[red]" if row.exceeded else "") + f"{figure(row.greatest)} {figure(row.tail):>4}"


def brief(loss: str) -> str:
    return short(loss).replace("_loss", "").replace("cross_entropy", "ce")


def document(rows: Sequence[Row], sums: Sequence[Sum]) -> str:
    facts = {
        "fusedloss": __version__,
        "torch": torch.__version__,
        "digits": exact.DIGITS,
        "cpus": os.cpu_count(),
    }
    finite = [{k: _finite(v) for k, v in asdict(row).items()} for row in rows]
    every = {**facts, "errors": finite, "sums": [asdict(s) for s in sums]}
    return json.dumps(every, indent=1) + "\n"


def _finite(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def around_table(file: File) -> tuple[str, str]:
    """The page before its table and after it."""
    page = file.read_text() if file.exists() else ""
    parts = re.split(f"{BEGIN}.*{END}", page, flags=re.DOTALL)
    if len(parts) != 2:
        raise UsageError(
            f"--markdown: must be a page with the lines {BEGIN} and {END}, got {str(file)!r}"
        )
    return parts[0], parts[1]


def write_table(file: File, rows: Sequence[Row], sums: Sequence[Sum]) -> None:
    """Puts the table between the marks of the page."""
    before, after = around_table(file)
    file.write_text(f"{before}{BEGIN}\n{markdown(rows, sums)}{END}{after}")


def markdown(rows: Sequence[Row], sums: Sequence[Sum]) -> str:
    """The CPU kernels' worst, the formula's and PyTorch's; the bound of each beside it."""
    lines = [
        "| loss | dtype | | kernels | bound | formula | bound | PyTorch |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    paths = list(dict.fromkeys(r.path for r in rows))
    kernels = [p for p in paths if p not in ("formula", PYTORCH.name, TRITON)]
    for loss, dtype, quantity, found in cells(rows, paths):
        by = {r.path: r for r in found if r is not None}
        ours = [by[p] for p in kernels if p in by]
        texts = [
            worst(ours),
            worst([by["formula"]]),
            worst([by[PYTORCH.name]] if PYTORCH.name in by else []),
        ]
        bounds = [bound_text(ours[:1]), bound_text([by["formula"]])]
        half = dtype in ("bfloat16", "float16")
        bounds = [f"½ + {b}*" if half else b for b in bounds]
        lines.append(
            f"| `{loss}` | {dtype} | {quantity} | {texts[0]} | {bounds[0]} | {texts[1]} | {bounds[1]} | "
            f"{texts[2]} |"
        )
    worst_sums = {
        name: max((s.error for s in sums if s.path in group), default=math.nan)
        for name, group in (("k", kernels), ("f", ["formula"]), ("p", [PYTORCH.name]))
    }
    most = max((s.terms for s in sums), default=0)
    lines.append(
        f"| sums and means, up to {most:,} terms | float32, float64 | total | {figure(worst_sums['k'])} | "
        f"{SUM_BOUND:g} | {figure(worst_sums['f'])} | - | {figure(worst_sums['p'])} |"
    )
    return "\n".join(lines) + "\n"


def worst(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    return f"{figure(max(r.greatest for r in rows))} ({figure(max(r.tail for r in rows))})"


def bound_text(rows: Sequence[Row]) -> str:
    return f"{rows[0].bound:g}" if rows and rows[0].bound is not None else "-"
