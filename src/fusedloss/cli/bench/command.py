"""`fusedloss bench`: the losses beside PyTorch, and beside what the machine can do."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import fusedloss

from ...engines.cpu import load
from . import cuda as gpu
from . import report, tables
from .cases import Case
from .harness import NO_COMPILER, Job, Result, available, needed, stream
from .selection import (
    FORMAT,
    Selection,
    UsageError,
    add_arguments,
    check_picture,
    check_writable,
    chosen_losses,
    chosen_threads,
    selection,
)

__all__ = ["add_arguments", "run"]

COMPILING = 10.0  # seconds, for the guess at the time left
QUICK = 105.0  # seconds, after which a quick run starts nothing more


def run(args: argparse.Namespace) -> int:
    """Measure and report; 0, or 1 for a result that eager contradicts, 2 on bad arguments."""
    try:
        if args.device == "cuda":
            check_writable("--output", args.output)
            if args.linear:
                from . import cuda_heads as gpu_linear

                return gpu_linear.run(args.output)
            return gpu.run(args.output, chosen_losses(args.only))
        if args.linear or args.calls:
            return other_bench(args)
        chosen = selection(args)
    except UsageError as error:
        print(f"fusedloss bench: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    bench = Bench(chosen, console)
    started, interrupted = time.perf_counter(), False
    here = machine(chosen.threads)
    console.print(headline(here), style="dim", markup=False)
    try:
        bench.measure()
    except KeyboardInterrupt:
        interrupted = True
    results = bench.in_order()
    show(console, results, chosen, args.targets)
    for note in bench.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    if results:
        about = {
            "format": FORMAT,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "fusedloss": {"version": fusedloss.__version__, "commit": commit()},
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": here,
            "quick": chosen.quick,
            "complete": not interrupted,
            "seconds": round(time.perf_counter() - started),
            "notes": bench.notes,
            "geometric_means": {n: tables.means(results, g) for g, n in tables.MEANS.items()},
        }
        document = {**about, "results": [r.to_json() for r in results]}
        args.output.write_text(json.dumps(document, allow_nan=False) + "\n")
        args.html.write_text(report.page(results, about), encoding="utf-8")
        if args.picture:
            report.picture(results, args.picture)
        console.print(f"Wrote {args.output} and {args.html} after {about['seconds']} s.")
    if interrupted:
        console.print(f"Interrupted: {len(results)} of {len(chosen.cases)} cases done.")
        return 130
    return int(any(r.wrong for r in results) or not results)


def other_bench(args: argparse.Namespace) -> int:
    from . import heads as linear
    from . import overhead as calls

    check_writable("--output", args.output)
    check_picture(args.picture)
    return (linear if args.linear else calls).run(args, chosen_threads(args.threads))


class Bench:
    """Runs the jobs, with a bar for all of them and one for the case at hand."""

    def __init__(self, chosen: Selection, console: Console) -> None:
        self.chosen, self.console = chosen, console
        self.results: dict[Case, Result] = {}
        self.notes: list[str] = []
        self.compiles = True
        self.started = time.perf_counter()

    def in_order(self) -> list[Result]:
        return [self.results[case] for case in self.chosen.cases if case in self.results]

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def measure(self) -> None:
        todo = list(self.chosen.jobs())
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[phase]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            # A thread that redraws would take its time from what is measured.
            auto_refresh=False,
            disable=not self.console.is_terminal,
        )
        total = sum(guess(job, case) for job in todo for case in job.cases)
        with bars:
            whole = bars.add_task("all", total=total, phase="")
            here = bars.add_task("", total=1.0, phase="")
            done, current = 0.0, None
            for job in todo:
                for kind, index, what in stream(self.adapted(job)) if self.fits(job) else ():
                    case = job.cases[index]
                    phase, part = what if kind == "progress" else ("", 1.0)
                    if case is not current:
                        bars.reset(here)
                        current = case
                    before = sum(guess(job, each) for each in job.cases[:index])
                    bars.update(whole, completed=done + before + part * guess(job, case))
                    bars.update(here, description=escape(case.title), completed=part, phase=phase)
                    bars.refresh()
                    if kind == "result":
                        self.take(job, case, what)
                done += sum(guess(job, case) for case in job.cases)
                bars.update(whole, completed=done)

    def fits(self, job: Job) -> bool:
        """Whether there is time and memory for the job, and what it measures can run."""
        if self.chosen.quick and time.perf_counter() - self.started > QUICK:
            self.note("the two minutes of a quick run are over: some cases are left out")
            return False
        if job.memory:
            result = self.results.get(job.cases[0])
            return result is not None and job.memory in result.samples
        for case in job.cases:
            if needed(case) > available():
                gigabytes = needed(case) / 1e9
                self.note(f"{case.title}: skipped, it may take {gigabytes:.0f} GB of memory")
                return False
        return True

    def adapted(self, job: Job) -> Job:
        if self.compiles:
            return job
        variants = tuple(v for v in job.plan.variants if v != "compile")
        return replace(job, plan=replace(job.plan, variants=variants))

    def take(self, job: Job, case: Case, what: Result | int | str) -> None:
        if isinstance(what, str):
            of = f", memory of {job.memory}" if job.memory else ""
            self.note(f"{case.title}{of}: {what}")
        elif isinstance(what, int):
            assert job.memory
            self.results[case].peaks[job.memory] = what
        else:
            self.results[case] = what
            for variant, why in what.skipped.items():
                if why == NO_COMPILER:
                    self.compiles = False
                    self.note(f"compile is skipped: {why}")
                else:
                    self.note(f"{case.title}: {variant} is skipped: {why}")
            if what.wrong:
                self.note(f"{case.title}: ours is not eager's result, apart by {what.difference}")
            if what.same_bits is False:
                self.note(f"{case.title}: the bits change with the number of threads")
            if not self.console.is_terminal:
                time = tables.clock(what.median("ours"))
                self.console.print(f"{case.title}: {time}", markup=False)


def guess(job: Job, case: Case) -> float:
    """Seconds that a case may take, for the time left."""
    variants = (job.memory,) if job.memory else job.plan.variants
    compiling = COMPILING * ("compile" in variants)
    work = case.numel * 5e-8
    return 0.3 + work + compiling + (0 if job.memory else job.plan.seconds + 10 * work)


def show(console: Console, results: Sequence[Result], chosen: Selection, targets: bool) -> None:
    cases = [r for r in results if r.case.group != "sweep"]
    points = [r for r in results if r.case.group == "sweep"]
    if cases:
        console.print(tables.cases_table(cases, console.width), "")
    if points:
        for table in tables.sweep_tables(points):
            console.print(table, "")
    if chosen.then:
        console.print(tables.against_table(results, chosen.then), "")
    if targets:
        console.print(tables.targets_table(results), "")
    if results:
        console.print(tables.means_table(results), "")


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": load.path().name if load.problem() is None else load.problem(),
        "memory_gb": round(available() / 1e9, 1) if available() < float("inf") else None,
        "huge_pages": huge_pages(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
    }


def headline(machine: dict[str, Any]) -> str:
    return (
        f"fusedloss {fusedloss.__version__}, torch {torch.__version__}, {machine['cpu']}, "
        f"{machine['capability']}, threads: {machine['threads']}, load: {machine['load']}"
    )


def first_line(path: str, key: str = "") -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.startswith(key)), None)


def huge_pages() -> str | None:
    """always, madvise or never."""
    choices = first_line("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    found = re.search(r"\[(\w+)\]", choices)
    return found and found[1]


def cpu_model() -> str:
    line = first_line("/proc/cpuinfo", "model name")
    return line.partition(":")[2].strip() if line else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of these sources, where they lie in a repository that tracks them."""
    source = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(source.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
