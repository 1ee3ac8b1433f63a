"""Every option set of every loss on few elements, forward and backward, beside PyTorch: a part of `--calls`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...front.definition import REGISTRY
from .cases import TIMED, Case
from .harness import Plan, Result, Work, begin, interleave, prepared, wall

SHAPES = ((3, 5), (64, 10), (256, 100))
AT_MOST, BY_LOSS = 1.05, {"nll_loss": 1.25}  # times PyTorch's time


@dataclass
class Small:
    """Seconds of one option set at one shape: the shortest, to which other programs only add."""

    loss: str
    option: str
    shape: tuple[int, ...]
    ours: float
    torch: float

    @property
    def ratio(self) -> float:
        return self.ours / self.torch

    @property
    def at_most(self) -> float:
        return BY_LOSS.get(REGISTRY[self.loss].name, AT_MOST)

    @property
    def excess(self) -> float:
        return self.ratio / self.at_most

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "at_most": self.at_most}


def cases(losses: Sequence[str] = TIMED) -> Iterator[Case]:
    for loss in losses:
        for option in REGISTRY[loss].options:
            for shape in SHAPES:
                yield Case(f"{loss} {option}", loss, shape, option=option)


def measure(case: Case, plan: Plan) -> Small | str:
    """What was found, or why nothing was."""
    work = Work(case)
    result: Result = begin(work)
    steps = prepared(work, ("ours", "eager"), result)
    if result.skipped:
        return "; ".join(f"{variant}: {why}" for variant, why in result.skipped.items())
    samples, _ = interleave({name: partial(wall, step) for name, step in steps.items()}, plan)
    return Small(case.loss, case.option, case.shape, min(samples["ours"]), min(samples["eager"]))


def table(results: Sequence[Small]) -> Table:
    """A row for each option set, that of the worst ratio first."""
    found = Table(title="forward and backward: fusedloss / PyTorch (µs → µs)")
    found.add_column("loss")
    found.add_column("options")
    for shape in SHAPES:
        found.add_column(" x ".join(map(str, shape)), justify="right")
    rows: dict[tuple[str, str], list[Small]] = {}
    for each in results:
        rows.setdefault((each.loss, each.option), []).append(each)
    for (loss, option), those in sorted(rows.items(), key=_worst, reverse=True):
        by_shape = {each.shape: each for each in those}
        found.add_row(escape(loss), option, *(_cell(by_shape.get(shape)) for shape in SHAPES))
    return found


def _worst(row: tuple[tuple[str, str], list[Small]]) -> float:
    return max(each.excess for each in row[1])


def _cell(each: Small | None) -> str:
    if each is None:
        return ""
    times = f"{1e6 * each.torch:.0f} → {1e6 * each.ours:.0f}"
    colour = "green" if each.excess <= 1 else "red"
    return f"[{colour}]{each.ratio:.2f}[/] [dim]{times}[/]"


def verdict(results: Sequence[Small]) -> str:
    met = sum(each.excess <= 1 for each in results)
    others = ", ".join(f"{loss} {most:g}" for loss, most in BY_LOSS.items())
    return f"{met} of {len(results)} take at most {AT_MOST:g} times PyTorch's time ({others})."
