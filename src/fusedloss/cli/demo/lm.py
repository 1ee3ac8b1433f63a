"""`fusedloss demo --lm`: a small language model trained four ways, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fusedloss

from ..bench.heads import COLOURS, LABELS
from ..decoder import BATCH, CONTEXT, Decoder
from ..processes import MEBI, in_a_process, resident

VOCABULARY = 32768
CORPUS_BYTES = 8_000_000
STEPS, QUICK_STEPS = 15, 5
RATE = 0.1
# Rounding grows from step to step of a training; what is wrong shows at once.
TOLERANCE = 5e-3


def corpus() -> str:
    """Python's own documentation, and after it the sources of its library."""
    from pydoc_data.topics import topics

    library = Path(os.__file__).parent
    folders = (
        library,
        *(library / name for name in ("asyncio", "email", "importlib", "json", "logging")),
    )
    sources = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    parts = [topics[name] for name in sorted(topics)]
    size = sum(map(len, parts))
    for path in sources:
        if size > CORPUS_BYTES:
            break
        parts.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(parts[-1])
    return "\n".join(parts)


def tokens(text: str, vocabulary: int) -> tuple[Tensor, int]:
    """The text as byte-pair tokens of a tokenizer trained on it, and how many kinds there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    lines = text.splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, trainer)
    ids = [i for line in tokenizer.encode_batch(lines) for i in line.ids]
    return torch.tensor(ids, dtype=torch.int32), tokenizer.get_vocab_size()


def loss_of(way: str, hidden: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
    hidden, target = hidden.flatten(0, 1), target.flatten()
    if way == "ours":
        return fusedloss.linear_cross_entropy(hidden, head.weight, target)
    if way == "torch":
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, head.weight, target, options=options)
    return F.cross_entropy(head(hidden), target)


@dataclass
class Training:
    losses: list[float]
    tokens_per_second: float
    peak: int  # bytes beyond the model


def train(way: str, ids: Tensor, vocabulary: int, steps: int, seed: int, threads: int) -> Training:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = Decoder(vocabulary)
    if way == "lazy":
        fusedloss.lazy_heads(model)
    # SGD and not Adam: Adam would hide a gradient that is wrong by a factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    before = resident("VmRSS")
    losses, seconds = [], []
    for _ in range(steps):
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH, 1))
        window = ids[starts + torch.arange(CONTEXT + 1)].long()
        start = time.perf_counter()
        loss = loss_of(way, model(window[:, :-1]), model.lm_head, window[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    # The fastest step: others at work on the machine can only slow it down.
    return Training(losses, BATCH * CONTEXT / min(seconds), resident("VmHWM") - before)


def ways() -> list[str]:
    return [w for w in LABELS if w != "torch" or hasattr(nn, "LinearCrossEntropyOptions")]


def run(args: argparse.Namespace) -> int:
    """Train: 0 when the curves agree, 1 when one does not."""
    started, console = time.perf_counter(), Console(highlight=False)
    text = corpus()
    ids, vocabulary = tokens(text, VOCABULARY)
    console.print(
        f"{len(text) / 1e6:.1f} MB of Python's documentation and library: {len(ids)} tokens, "
        f"{vocabulary} of a kind; {time.perf_counter() - started:.0f} s"
    )
    whole = QUICK_STEPS if args.quick else STEPS
    found: dict[str, Training] = {}
    for way in ways():
        # Torch's chunks of a few rows take ten times as long on a CPU: a third of the steps shows it.
        steps = -(-whole // 3) if way == "torch" else whole
        found[way] = in_a_process(
            train, way, ids, vocabulary, steps, args.seed, torch.get_num_threads()
        )
        console.print(f"{LABELS[way]}: {steps} steps of {BATCH * CONTEXT} tokens")
    console.print(summary(found))
    apart = difference(found)
    agree = apart <= TOLERANCE
    colour, word = ("green", "agree") if agree else ("red bold", "do not agree")
    console.print(f"[{colour}]The loss curves {word}: at most {apart:.1e} apart.[/]")
    report = {
        "torch": torch.__version__,
        "vocabulary": vocabulary,
        "tokens_a_step": BATCH * CONTEXT,
        "greatest_relative_difference": apart,
        "ways": {way: asdict(each) for way, each in found.items()},
    }
    wrote = "fusedloss-lm.json"
    (args.output / wrote).write_text(json.dumps(report, indent=1) + "\n")
    if not args.no_plot:
        plot(found, args.output / "fusedloss-lm.png")
        wrote = "fusedloss-lm.png and .json"
    console.print(
        f"Wrote {wrote} to {args.output.resolve()}, {time.perf_counter() - started:.0f} s."
    )
    return int(not agree)


def difference(found: dict[str, Training]) -> float:
    """The greatest of the curves from eager's, relative to it; infinite where one is NaN."""
    eager = torch.tensor(found["eager"].losses, dtype=torch.float64)
    others = [torch.tensor(each.losses, dtype=torch.float64) for each in found.values()]
    gaps = torch.stack([(other / eager[: len(other)] - 1).abs().max() for other in others])
    return gaps.nan_to_num(nan=float("inf")).max().item()


def summary(found: dict[str, Training]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("linear cross entropy", "tokens a second", "peak memory, MiB", "loss"):
        table.add_column(column, justify="left" if column.startswith("linear") else "right")
    for way, each in found.items():
        ends = f"{each.losses[0]:.4f} → {each.losses[-1]:.4f}"
        table.add_row(LABELS[way], f"{each.tokens_per_second:.0f}", f"{each.peak / MEBI:.0f}", ends)
    return table


def plot(found: dict[str, Training], path: Path) -> None:
    """The curves, and bars of speed and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels: Any = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    curves, speed, memory = panels
    styles: dict[str, dict[str, Any]] = {
        "eager": {"lw": 5, "alpha": 0.4},
        "torch": {"lw": 2},
        "ours": {"lw": 1, "ls": "--"},
        "lazy": {"lw": 1, "ls": ":"},
    }
    for way, each in sorted(found.items()):
        steps = range(1, len(each.losses) + 1)
        curves.plot(steps, each.losses, color=COLOURS[way], label=LABELS[way], **styles[way])
    curves.set_xlabel("step")
    curves.set_title("loss", loc="left", fontsize=10)
    curves.legend(frameon=False, fontsize=8)
    names, colours = [LABELS[w] for w in found], [COLOURS[w] for w in found]
    for axes, title, values in (
        (speed, "tokens a second", [each.tokens_per_second for each in found.values()]),
        (memory, "peak memory, MiB", [each.peak / MEBI for each in found.values()]),
    ):
        bars = axes.bar(names, values, color=colours)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.tick_params(axis="x", labelrotation=25, labelsize=8)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
