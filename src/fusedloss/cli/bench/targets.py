"""The targets of `fusedloss bench`: those that stand beside the losses' cases, and those over all results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .cases import CASES
from .harness import Result

Measure = Callable[[Sequence[Result]], "float | None"]
YARDSTICKS = ("x - y", "x - y, z.clone()", "clone()")  # of the cases' targets


@dataclass(frozen=True)
class Target:
    """What must be reached: `measured` of all results, at most or at least `bound`."""

    text: str
    measured: Measure
    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def ratio_of(title: str, other: str) -> Measure:
    """The time of ours over the time of another variant, in the case of this title."""

    def measured(results: Sequence[Result]) -> float | None:
        return next((r.ratio("ours", other) for r in results if r.case.title == title), None)

    return measured


def mean_of(over: str) -> Measure:
    """The geometric mean over the table of another variant's time over ours."""
    return lambda results: geometric_mean(
        r.ratio(over, "ours") for r in results if r.case.group == "table"
    )


def geometric_mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


def worst(
    value: Callable[[Result], float | None], keep: Callable[[Result], bool] = lambda _: True
) -> Measure:
    def measured(results: Sequence[Result]) -> float | None:
        return max((v for r in results if keep(r) and (v := value(r)) is not None), default=None)

    return measured


def _targets() -> Iterator[Target]:
    for case in CASES:
        for other, bound in case.at_most.items():
            variant = "yardstick" if other in YARDSTICKS else other
            yield Target(f"{case.title} / {other}", ratio_of(case.title, variant), bound)
    yield Target("faster than eager, geometric mean", mean_of("eager"), 6.0, at_least=True)
    yield Target("faster than compile, geometric mean", mean_of("compile"), 2.5, at_least=True)
    yield Target("/ eager, the worst of all", worst(lambda r: r.ratio("ours", "eager")), 1.05)
    yield Target(
        "/ eager at 3x5, the worst",
        worst(lambda r: r.ratio("ours", "eager"), lambda r: r.case.numel == 15),
        1.0,
    )
    yield Target(
        "MB beyond inputs and gradient, the most",
        # CTC keeps the states of a sequence for each thread.
        worst(lambda r: r.excess("ours"), lambda r: r.case.row.kind != "sequences"),
        1.0,
    )
    yield Target(
        "cases whose bits change with the threads",
        lambda results: float(sum(r.same_bits is False for r in results)) if results else None,
        0.0,
    )


TARGETS = tuple(_targets())
