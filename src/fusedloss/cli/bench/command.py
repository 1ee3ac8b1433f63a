"""`fusedloss bench`: the losses beside PyTorch, and beside what the machine can do."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..arguments import (
    UsageError,
    check_picture,
    check_writable,
    chosen_losses,
    chosen_threads,
)
from ..processes import NO_COMPILER, available
from . import compiled, cuda, distributed, heads, overhead, report, shards, tables
from .cases import TIMED, Case
from .cpu import Job, needed, stream
from .harness import Result
from .machine import Run
from .selection import Selection, selection

COMPILING = 10.0  # seconds, for the guess at the time left
AGAIN = 2  # times, what seems slower than another build
QUICK = 105.0  # seconds, after which a quick run starts nothing more


def run(args: argparse.Namespace) -> int:
    """Measure and report; 0, or 1 for a result that eager contradicts, 2 on bad arguments."""
    try:
        if args.device == "cuda":
            check_writable("--output", args.output)
            if args.linear:
                return heads.run_on_gpu(args.output)
            return cuda.run(args.output, chosen_losses(args.only, TIMED))
        own = {
            "linear": heads.run,
            "calls": overhead.run,
            "compiled": compiled.run,
            "distributed": distributed.run,
            "shards": shards.run,
        }
        for name, bench in own.items():
            if getattr(args, name):
                check_writable("--output", args.output)
                check_picture(args.picture)
                return bench(args, chosen_threads(args.threads))
        return run_cases(args, selection(args))
    except UsageError as error:
        print(f"fusedloss bench: {error}", file=sys.stderr)
        return 2


def run_cases(args: argparse.Namespace, chosen: Selection) -> int:
    this = Run(chosen.threads, 200)
    bench, interrupted = Bench(chosen, this.console), False
    try:
        bench.measure()
        bench.measure_again()
    except KeyboardInterrupt:
        interrupted = True
    results = bench.in_order()
    show(this.console, results, chosen, args.targets)
    for note in bench.notes:
        this.console.print(note, style="yellow", markup=False, soft_wrap=True)
    if results:
        about = this.document(
            quick=chosen.quick,
            complete=not interrupted,
            notes=bench.notes,
            geometric_means={n: tables.means(results, g) for g, n in tables.MEANS.items()},
        )
        args.html.write_text(report.page(results, about), encoding="utf-8")
        if args.picture:
            report.picture(results, args.picture)
        document = {**about, "results": [r.to_json() for r in results]}
        this.write(args.output, document, f" and {args.html}")
    if interrupted:
        this.console.print(f"Interrupted: {len(results)} of {len(chosen.cases)} cases done.")
        return 130
    return int(any(r.wrong for r in results) or not results)


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

    def measure_again(self) -> None:
        """What seems slower than the other build: its workers may have had unlucky pages."""
        for case, result in list(self.results.items()) * AGAIN:
            if tables.against_word(result) != tables.SLOWER_WORD:
                continue
            job = Job((case,), replace(self.chosen.plan(case), variants=()))
            for kind, _, found in stream(job):
                if kind == "result" and isinstance(found, Result):
                    before, now = (tables.against_build(r) for r in (result, found))
                    if before and now and min(now) < min(before):
                        result.samples |= found.samples

    def fits(self, job: Job) -> bool:
        """Whether there is time and memory for the job, and what it measures can run."""
        if self.chosen.quick and time.perf_counter() - self.started > QUICK:
            self.note("the two minutes of a quick run are over: some cases are left out")
            return False
        if job.memory:
            result = self.results.get(job.cases[0])
            return result is not None and job.memory in result.samples
        for case in job.cases:
            if needed(case, job.plan) > available():
                gigabytes = needed(case, job.plan) / 1e9
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
    if chosen.against:
        console.print(tables.builds_table(results), tables.slowest(results), "")
    if targets:
        console.print(tables.targets_table(results), "")
    if results:
        console.print(tables.means_table(results), "")
