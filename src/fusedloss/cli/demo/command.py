"""`fusedloss demo`: train a model per loss with torch.nn and with fusedloss.nn, and compare."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from .arguments import QUICK
from .report import plot, report
from .tasks import TASKS, Task
from .training import Result, train

LEGEND = """[dim]
apart: greatest difference of the two loss curves; bound: what rounding explains
µs in loss: torch.nn → fusedloss, forward and backward, median step, one thread
[/]"""


def summary(results: Sequence[Result]) -> Table:
    """What the demo found, one loss a row."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("loss\n[dim]task[/]", no_wrap=True)
    table.add_column("held out\n[dim]untrained[/]", no_wrap=True)
    table.add_column("\ntorch.nn", justify="right", no_wrap=True)
    table.add_column("\nfusedloss", justify="right", no_wrap=True)
    table.add_column("apart\n[dim]bound[/]", justify="right", no_wrap=True)
    table.add_column("µs in loss\n[dim]ratio[/]", justify="right", no_wrap=True)
    for result in results:
        theirs, ours = result.microseconds
        colour = (
            "red" if result.wrong is not None else "yellow" if result.parts is not None else "green"
        )
        table.add_row(
            f"[bold]{result.task.loss.removesuffix('Loss')}[/]\n[dim]{result.task.title}[/]",
            f"{result.task.metric}\n[dim]{result.before:.3f}[/]",
            f"{result.scores[0]:.3f}",
            f"{result.scores[1]:.3f}",
            f"[{colour}]{result.difference.max():.1e}[/]\n[dim]{result.bound[-1]:.1e}[/]",
            f"{theirs:.0f} → {ours:.0f}\n[dim]{ours / theirs:.2f}[/]",
        )
    return table


def verdict(results: Sequence[Result]) -> list[str]:
    """A line for each curve that parts from PyTorch's, and one for all that do not."""
    lines = []
    for result in results:
        step = result.parts if result.wrong is None else result.wrong
        if step is None:
            continue
        ours, theirs, bound = result.fusedloss[step], result.torch[step], result.bound[step]
        apart = f"{result.task.loss}, step {step}: fusedloss {ours:.9g}, torch.nn {theirs:.9g}"
        if result.wrong is None:
            lines.append(
                f"[yellow]{apart}: by rounding, a hinge closed in one run and not in the other; "
                f"each loss and gradient is right for its predictions[/]"
            )
        else:
            lines.append(
                f"[red bold]{apart}: {abs(ours - theirs):.2g} apart, but rounding explains only "
                f"{bound:.2g}[/]"
            )
    if results and all(result.parts is None for result in results):
        lines.append("[green]Every curve is PyTorch's, within what float32 rounding explains.[/]")
    return lines


def run(args: argparse.Namespace) -> int:
    """Train every task: 0 when all curves are PyTorch's, 1 when one is not, 2 on bad arguments."""
    started = time.perf_counter()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        return unwritable(args.output, error)
    if args.lm:
        from . import lm

        return lm.run(args)
    if args.distributed:
        from . import distributed

        return distributed.run(args)
    console = Console(highlight=False)
    tasks = [task for task in TASKS if not args.only or task.loss in args.only]
    results: list[Result] = []
    interrupted = False
    threads = torch.get_num_threads()
    # Batches this small gain nothing from a second thread, and stall where cores are busy.
    torch.set_num_threads(1)
    try:
        for result in train_all(tasks, args.seed, QUICK if args.quick else 1, console):
            results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        torch.set_num_threads(threads)

    if results:
        console.print()
        console.print(summary(results))
        console.print(LEGEND)
    for line in verdict(results):
        console.print(line)
    if interrupted:
        console.print(f"Interrupted: {len(results)} of {len(tasks)} tasks done, nothing written.")
        return 130
    try:
        wrote = write(results, args)
    except OSError as error:
        return unwritable(args.output, error)
    console.print(
        f"Wrote {wrote} to {args.output.resolve()}, {time.perf_counter() - started:.0f} s."
    )
    return int(any(result.wrong is not None for result in results))


def unwritable(output: Path, error: OSError) -> int:
    print(
        f"fusedloss demo: --output: must be a directory that can be written to, "
        f"got {str(output)!r} ({error.strerror})",
        file=sys.stderr,
    )
    return 2


def write(results: Sequence[Result], args: argparse.Namespace) -> str:
    """Write the files and return their names."""
    text = json.dumps(report(results, args.seed, args.quick), indent=1, allow_nan=False)
    (args.output / "fusedloss-demo.json").write_text(text + "\n")
    if args.no_plot:
        return "fusedloss-demo.json"
    plot(results, args.output / "fusedloss-demo.png")
    return "fusedloss-demo.png and .json"


def train_all(tasks: Sequence[Task], seed: int, shorter: int, console: Console) -> Iterator[Result]:
    """Train one task after the other with a progress bar for each."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        # A thread that redraws would disturb the clock.
        auto_refresh=False,
        disable=not console.is_terminal,
    )
    with bars:
        ids = [bars.add_task(task.loss, start=False, total=1) for task in tasks]
        for bar, task in zip(ids, tasks, strict=True):
            bars.start_task(bar)

            def on_step(done: int, total: int, bar: TaskID = bar) -> None:
                bars.update(bar, completed=done, total=total)
                if done % 20 == 0 or done == total:
                    bars.refresh()

            result = train(task, seed, max(1, task.epochs // shorter), on_step)
            if not console.is_terminal:
                console.print(f"{task.loss}: {len(result.torch)} steps")
            yield result
