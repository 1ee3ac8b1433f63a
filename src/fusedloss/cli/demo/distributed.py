"""`fusedloss demo --distributed`: the language model of `--lm` on two processes, beside one."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fusedloss
from fusedloss.distributed import count

from ..decoder import BATCH, CONTEXT, Decoder
from ..processes import MEBI, in_a_process, resident
from .lm import RATE, VOCABULARY, corpus, tokens

WORLD = 2
STEPS, QUICK_STEPS = 12, 4
# Rounding grows from step to step of a training; a mean of unequal parts is off by far more at once.
TOLERANCE = 5e-4
PATIENCE = timedelta(seconds=60)  # of a process that waits for the other
LABELS = {
    "one": "one process",
    "data": "DDP: half of the rows each",
    "classes": "class_group: half of the classes each",
}
COLOURS = {"one": "#9ecae1", "data": "#08306b", "classes": "#cb181d"}


class Model(nn.Module):
    """The decoder with its loss, which never has the logits; the head may hold a part of the classes."""

    def __init__(self, vocabulary: int, group: Any = None) -> None:
        super().__init__()
        self.decoder, self.group = Decoder(vocabulary), group
        if group is not None:
            head = self.decoder.lm_head
            own = head.weight.detach().tensor_split(group.size())[group.rank()]
            head.weight = nn.Parameter(own.clone())

    def forward(self, ids: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
        return fusedloss.linear_cross_entropy(
            self.decoder(ids).flatten(0, 1),
            self.decoder.lm_head.weight,
            target.flatten(),
            denominator=denominator,
            class_group=self.group,
        )


def batch(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of the text, whose targets end early: the first rows have fewer than the last ones."""
    starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH, 1))
    window = ids[starts + torch.arange(CONTEXT + 1)].long()
    lengths = torch.linspace(CONTEXT // 8, CONTEXT, BATCH).long()
    target = window[:, 1:].masked_fill(torch.arange(CONTEXT) >= lengths[:, None], -100)
    return window[:, :-1], target


@dataclass
class Training:
    losses: list[float]
    seconds: float  # of the fastest step
    peak: int  # bytes of weights, gradients and all else


def train(
    way: str, rank: int, store: str, ids: Tensor, vocabulary: int, steps: int, seed: int
) -> Training:
    """What one process does."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    before = resident("VmRSS")
    group = None
    if way != "one":
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, WORLD),
            rank=rank,
            world_size=WORLD,
            timeout=PATIENCE,
        )
        group = dist.group.WORLD
    model: nn.Module = Model(vocabulary, group if way == "classes" else None)
    if way == "data":
        model = nn.parallel.DistributedDataParallel(model)
    # SGD and not Adam: Adam would hide a gradient that is wrong by a factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the whole head was there for a moment
    losses, seconds = [], []
    for _ in range(steps):
        whole = batch(ids)  # alike on all processes
        start = time.perf_counter()
        own = [t.tensor_split(WORLD)[rank] for t in whole] if way == "data" else whole
        inputs, target = own
        denominator = count(target, group) if way == "data" else count(target)
        loss = model(inputs, target, denominator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        if way == "data":
            dist.all_reduce(mean, dist.ReduceOp.AVG)
        losses.append(mean.item())
        seconds.append(time.perf_counter() - start)
    if way != "one":
        dist.destroy_process_group()
    return Training(losses, min(seconds), resident("VmHWM") - before)


def on_processes(way: str, *arguments: Any) -> list[Training]:
    """The same way on all of its processes, at once."""
    world = 1 if way == "one" else WORLD
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(world) as threads:
        started = [
            threads.submit(in_a_process, train, way, rank, f"{folder}/store", *arguments)
            for rank in range(world)
        ]
        return [each.result() for each in started]


def run(args: argparse.Namespace) -> int:
    """Train: 0 when the curves agree, 1 when one does not."""
    started, console = time.perf_counter(), Console(highlight=False)
    ids, vocabulary = tokens(corpus(), VOCABULARY)
    console.print(f"{len(ids)} tokens, {vocabulary} of a kind; one thread a process")
    steps = QUICK_STEPS if args.quick else STEPS
    found: dict[str, list[Training]] = {}
    for way, label in LABELS.items():
        found[way] = on_processes(way, ids, vocabulary, steps, args.seed)
        console.print(f"{label}: {steps} steps of {BATCH * CONTEXT} tokens")
    console.print(summary(found))
    apart, alike = difference(found), same_everywhere(found)
    agree = apart <= TOLERANCE and alike
    colour, word = ("green", "agree") if agree else ("red bold", "do not agree")
    also = "" if alike else ", and differ from process to process"
    console.print(f"[{colour}]The loss curves {word}: at most {apart:.1e} apart{also}.[/]")
    report = {
        "torch": torch.__version__,
        "vocabulary": vocabulary,
        "processes": WORLD,
        "greatest_relative_difference": apart,
        "same_on_all_processes": alike,
        "ways": {way: [asdict(each) for each in ranks] for way, ranks in found.items()},
    }
    wrote = "fusedloss-distributed.json"
    (args.output / wrote).write_text(json.dumps(report, indent=1) + "\n")
    if not args.no_plot:
        plot(found, args.output / "fusedloss-distributed.png")
        wrote = "fusedloss-distributed.png and .json"
    console.print(
        f"Wrote {wrote} to {args.output.resolve()}, {time.perf_counter() - started:.0f} s."
    )
    return int(not agree)


def difference(found: dict[str, list[Training]]) -> float:
    """The greatest of the curves from one process's, relative to it; infinite where one is NaN."""
    one = torch.tensor(found["one"][0].losses, dtype=torch.float64)
    others = [torch.tensor(r.losses, dtype=torch.float64) for rs in found.values() for r in rs]
    gaps = torch.stack([(other / one - 1).abs().max() for other in others])
    return gaps.nan_to_num(nan=float("inf")).max().item()


def same_everywhere(found: dict[str, list[Training]]) -> bool:
    """Whether each process saw the same losses, to the bit."""
    return all(each.losses == ranks[0].losses for ranks in found.values() for each in ranks)


def summary(found: dict[str, list[Training]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "seconds a step", "memory of a process, MiB", "loss"):
        table.add_column(column, justify="right" if column else "left")
    for way, ranks in found.items():
        losses = ranks[0].losses
        table.add_row(
            LABELS[way],
            f"{max(each.seconds for each in ranks):.2f}",
            ", ".join(f"{each.peak / MEBI:.0f}" for each in ranks),
            f"{losses[0]:.4f} → {losses[-1]:.4f}",
        )
    return table


def plot(found: dict[str, list[Training]], path: Path) -> None:
    """The curves, and bars of time and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels: Any = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    curves, speed, memory = panels
    styles: dict[str, dict[str, Any]] = {
        "one": {"lw": 5},
        "data": {"lw": 2},
        "classes": {"lw": 1, "ls": "--"},
    }
    for way, ranks in found.items():
        losses = ranks[0].losses
        steps = range(1, len(losses) + 1)
        curves.plot(steps, losses, color=COLOURS[way], label=LABELS[way], **styles[way])
    curves.set_xlabel("step")
    curves.set_title("loss", loc="left", fontsize=10)
    curves.legend(frameon=False, fontsize=8)
    names, colours = [w.split(":")[0] for w in LABELS.values()], list(COLOURS.values())
    seconds = [max(each.seconds for each in ranks) for ranks in found.values()]
    peaks = [max(each.peak for each in ranks) / MEBI for ranks in found.values()]
    for axes, title, values, form in (
        (speed, "seconds a step", seconds, "{:.2f}"),
        (memory, "memory of a process, MiB", peaks, "{:.0f}"),
    ):
        bars = axes.bar(names, values, color=colours)
        axes.bar_label(bars, fmt=form, fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.tick_params(axis="x", labelrotation=25, labelsize=8)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
