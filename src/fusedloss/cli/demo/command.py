"""`fusedloss demo`: train a model per loss with torch.nn and with fusedloss.nn, and compare."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
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
from torch import Tensor

import fusedloss

from ... import nn as fused
from .tasks import TASKS, Problem, Task

Floats = np.ndarray[Any, np.dtype[np.float64]]
OnStep = Callable[[int, int], None]

QUICK = 5
WARM_UP = 10
# Rounding otherwise than PyTorch may cost this multiple of what PyTorch's own rounding costs.
ROUNDING_FACTOR = 4.0
# Of the loss: where PyTorch happens to round to the exact value.
FLOOR_ULPS = 8.0

LIGHT, DARK, RED, GREY = "#9ecae1", "#08306b", "#cb181d", "#555555"
FLOOR = 1e-9
LEGEND = """[dim]
apart: greatest difference of the two loss curves; bound: what rounding explains
µs in loss: torch.nn → fusedloss, forward and backward, median step, one thread
[/]"""


class Run:
    """One training of a problem's model, with the loss of one library in one dtype."""

    def __init__(self, task: Task, problem: Problem, library: Any, dtype: torch.dtype) -> None:
        self.model = copy.deepcopy(problem.model).to(dtype)
        self.criterion = getattr(library, task.loss)(**problem.options).to(dtype)
        self.judge = getattr(torch.nn, task.loss)(**problem.options).double()
        # SGD and not Adam: Adam would hide a gradient that is wrong by a factor.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=task.rate, momentum=0.9)
        self.inputs = problem.inputs.to(dtype)
        floating = problem.targets.is_floating_point()
        self.targets = problem.targets.to(dtype) if floating else problem.targets
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.seconds: list[float] = []

    def step(self, rows: Tensor) -> None:
        """Train on one batch; the clock runs in the loss and its backward, not in the model."""
        outputs = self.model(self.inputs[rows])
        triplets = rows.ndim == 2
        predictions = outputs.detach().unbind(0) if triplets else (outputs.detach(),)
        targets = () if triplets else (self.targets[rows],)
        for each in predictions:
            each.requires_grad_()
        start = time.perf_counter()
        loss = self.criterion(*predictions, *targets)
        loss.backward()
        self.seconds.append(time.perf_counter() - start)
        gradient = torch.stack([each.grad for each in predictions])
        self.optimizer.zero_grad()
        outputs.backward(gradient.view_as(outputs))
        self.optimizer.step()
        self.losses.append(loss.item())
        if loss.dtype is torch.float32:
            self.errors.append(error_of(self.judge, predictions, targets, loss, gradient))


def error_of(
    judge: torch.nn.Module,
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    loss: Tensor,
    gradient: Tensor,
) -> float:
    """The relative error of a loss and its gradient against the same in float64."""
    exact = [each.detach().double().requires_grad_() for each in predictions]
    others = [each.double() if each.is_floating_point() else each for each in targets]
    value = judge(*exact, *others)
    slopes = torch.stack(torch.autograd.grad(value, exact))
    pairs = ((loss.detach(), value.detach()), (gradient, slopes))
    tiny = torch.finfo(torch.float32).tiny
    errors = [(a - b).abs().max() / (b.abs().max() + tiny) for a, b in pairs]
    return torch.stack(errors).max().item()


@dataclass(frozen=True)
class Result:
    """Both libraries' curves on one task, and how far rounding lets them part."""

    task: Task
    before: float
    scores: tuple[float, float]
    microseconds: tuple[float, float]
    torch: Floats
    fusedloss: Floats
    float64: Floats
    torch_error: Floats
    fusedloss_error: Floats

    @property
    def difference(self) -> Floats:
        return np.abs(self.fusedloss - self.torch)

    @property
    def bound(self) -> Floats:
        """What rounding explains: a multiple of PyTorch's own departure from float64 so far."""
        scale = np.maximum.accumulate(np.abs(self.torch))
        return allowance(np.abs(self.torch - self.float64), scale)

    @property
    def parts(self) -> int | None:
        """The step from which the curves differ by more than the bound."""
        return first(self.difference, self.bound)

    @property
    def wrong(self) -> int | None:
        """The step from which rounding cannot explain the difference of the curves.

        A hinge that rounding closes in one run alone sets two curves apart though neither library
        errs. So where there is a hinge, a loss or a gradient must also have been wrong for the
        predictions that it was given.
        """
        parts = self.parts
        if parts is None or not self.task.triplets:
            return parts
        erring = first(self.fusedloss_error, allowance(self.torch_error, np.float64(1.0)))
        return None if erring is None else max(parts, erring)


def allowance(errors: Floats, scale: Floats | np.float64) -> Floats:
    ulp = float(np.finfo(np.float32).eps)
    return ROUNDING_FACTOR * np.maximum.accumulate(errors) + FLOOR_ULPS * ulp * scale


def first(values: Floats, bound: Floats) -> int | None:
    """The first step at which a value is not within the bound, as NaN never is."""
    steps = np.flatnonzero(~(values <= bound))
    return int(steps[0]) if len(steps) else None


def train(task: Task, seed: int, epochs: int, on_step: OnStep = lambda done, total: None) -> Result:
    """Train side by side, step by step, from the same weights on the same batches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        problem = task.build(seed)
    theirs = Run(task, problem, torch.nn, torch.float32)
    ours = Run(task, problem, fused, torch.float32)
    exact = Run(task, problem, torch.nn, torch.float64)
    total = task.steps(problem.targets, epochs)
    for step, rows in enumerate(task.batches(problem.targets, epochs, seed)):
        # Whoever goes second finds warmer caches, so they take turns.
        for run in (theirs, ours) if step % 2 else (ours, theirs):
            run.step(rows)
        exact.step(rows)
        on_step(step + 1, total)
    with torch.no_grad():
        before, *scores = [problem.score(m) for m in (problem.model, theirs.model, ours.model)]
    warm = min(WARM_UP, total // 2)
    medians = [float(np.median(run.seconds[warm:])) * 1e6 for run in (theirs, ours)]
    return Result(
        task=task,
        before=before,
        scores=(scores[0], scores[1]),
        microseconds=(medians[0], medians[1]),
        torch=np.array(theirs.losses),
        fusedloss=np.array(ours.losses),
        float64=np.array(exact.losses),
        torch_error=np.array(theirs.errors),
        fusedloss_error=np.array(ours.errors),
    )


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


def report(results: Sequence[Result], seed: int, quick: bool) -> dict[str, Any]:
    """All numbers, for the JSON file."""
    return {
        "versions": {
            "fusedloss": fusedloss.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "seed": seed,
        "quick": quick,
        "tasks": [
            {
                "loss": result.task.loss,
                "task": result.task.title,
                "metric": result.task.metric,
                "steps": len(result.torch),
                "held_out": {
                    "untrained": result.before,
                    "torch": result.scores[0],
                    "fusedloss": result.scores[1],
                },
                "median_microseconds_in_loss": {
                    "torch": result.microseconds[0],
                    "fusedloss": result.microseconds[1],
                },
                "greatest_relative_error": {
                    "torch": finite(result.torch_error.max()),
                    "fusedloss": finite(result.fusedloss_error.max()),
                },
                "greatest_difference": finite(result.difference.max()),
                "parts_at_step": result.parts,
                "wrong_at_step": result.wrong,
                "curves": {
                    "torch": [finite(loss) for loss in result.torch],
                    "fusedloss": [finite(loss) for loss in result.fusedloss],
                    "torch_float64": [finite(loss) for loss in result.float64],
                    "bound": [finite(bound) for bound in result.bound],
                },
            }
            for result in results
        ],
    }


def finite(value: float) -> float | None:
    """The value as JSON can hold it."""
    return float(value) if np.isfinite(value) else None


def plot(results: Sequence[Result], path: Path) -> None:
    """A panel per loss: both curves, and below them how far they are apart."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(0.6 + 3.7 * columns, 1.0 + 3.4 * rows))
    figure.set_layout_engine("constrained", wspace=0.03, h_pad=0.06)
    panels = figure.add_gridspec(rows, columns)
    for index, result in enumerate(results):
        cell = panels[index // columns, index % columns].subgridspec(2, 1, height_ratios=(3, 1))
        axes_of_cell: Any = cell.subplots(sharex=True)
        curves, apart = axes_of_cell
        for axes in (curves, apart):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8, color=GREY, labelcolor=GREY)
            axes.margins(x=0.01)
        steps = np.arange(1, len(result.torch) + 1)
        curves.plot(steps, result.torch, color=LIGHT, lw=5, solid_capstyle="round")
        curves.plot(steps, result.fusedloss, color=DARK, lw=1, ls=(0, (4, 2)))
        curves.set_ylim(bottom=min(0.0, np.nanmin(result.torch)))
        curves.set_title(result.task.loss, fontsize=11, fontweight="bold", loc="left", pad=16)
        theirs, ours = result.scores
        curves.text(
            *(0, 1.03, f"{result.task.title}: {result.task.metric} {theirs:.3f} and {ours:.3f}"),
            transform=curves.transAxes,
            fontsize=8.5,
            color=GREY,
        )
        apart.fill_between(steps, FLOOR, np.maximum(result.difference, FLOOR), color=DARK, lw=0)
        apart.plot(steps, result.bound, color=RED, lw=1.2)
        apart.set_yscale("log")
        apart.set_ylim(FLOOR, 3 * np.nanmax([*result.bound, *result.difference]))
        if index % columns == 0:
            curves.set_ylabel("loss", fontsize=9)
            apart.set_ylabel("apart", fontsize=9)
        apart.set_xlabel("step", fontsize=9)
    figure.legend(
        handles=[
            Line2D([], [], color=LIGHT, lw=5, label="torch.nn"),
            Line2D([], [], color=DARK, lw=1.2, ls=(0, (4, 2)), label="fusedloss.nn"),
            Patch(color=DARK, label="how far apart"),
            Line2D([], [], color=RED, lw=1.2, label="what float32 rounding explains"),
        ],
        loc="outside upper center",
        ncols=min(4, 2 * columns),
        frameon=False,
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def loss_name(text: str) -> str:
    """The loss that a word of `--only` names; `mse` and `MSELoss` are the same."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "").removesuffix("loss")

    for task in TASKS:
        if plain(task.loss) == plain(text):
            return task.loss
    names = ", ".join(task.loss for task in TASKS)
    raise argparse.ArgumentTypeError(f"must be among {names}, got {text!r}")


def seed_value(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)"
    )
    parser.add_argument("--seed", type=seed_value, default=0, help="default: 0")
    parser.add_argument(
        "--only", type=loss_name, nargs="+", metavar="LOSS", help="run these losses' tasks alone"
    )
    parser.add_argument(
        "--lm", action="store_true", help="a language model, its head and loss three ways"
    )
    parser.add_argument("--quick", action="store_true", help=f"train 1/{QUICK} of the epochs")
    parser.add_argument("--no-plot", action="store_true", help="do not draw fusedloss-demo.png")


def run(args: argparse.Namespace) -> int:
    """Train every task: 0 when all curves are PyTorch's, 1 when one is not, 2 on bad arguments."""
    started = time.perf_counter()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        return unwritable(args.output, error)
    if not args.no_plot:
        # Before the training: a missing matplotlib is said at once.
        import_module("matplotlib")
    if args.lm:
        from . import lm

        return lm.run(args)
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
