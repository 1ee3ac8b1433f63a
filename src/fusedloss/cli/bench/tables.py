"""What `fusedloss bench` prints: ratios first, then times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from .cases import VARIANTS
from .harness import Result
from .targets import TARGETS, Target, geometric_mean

MISSING = "-"
SLOWER = 1.05
SLOWER_BUILD = 1.03
SLOWER_WORD = "[red]slower[/]"
RATIOS = (("ours", "yardstick"), ("eager", "ours"), ("compile", "ours"))
MEANS = {"table": "of the cases", "sweep": "of the sweep", "": "of all"}


def clock(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit or name == "µs":
            return f"{figures(seconds / unit)} {name}"
    raise AssertionError("the last unit takes everything")


def figures(value: float | None) -> str:
    """Three figures, or all before the point."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def coloured(value: float | None, good: bool, bad: bool) -> str:
    colour = "red" if bad else "green" if good else ""
    return f"[{colour}]{figures(value)}[/]" if colour and value else figures(value)


def ratio_cell(value: float | None, variant: str) -> str:
    if value is None:
        return MISSING
    if variant == "ours":
        return coloured(value, value <= 1, False)
    return coloured(value, value >= 1, value < 1 / SLOWER)


def new_table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        min_width=len(title),
    )


def cases_table(results: Sequence[Result], width: int) -> Table:
    """A row a case; the columns on the right go first where the terminal is narrow."""
    table = new_table("Forward and backward")
    table.add_column("\ncase", no_wrap=True)
    ratios = [pair for pair in RATIOS if any(r.ratio(*pair) for r in results)]
    for variant, to in ratios:
        table.add_column(f"{variant} /\n{to}", justify="right", no_wrap=True)
    times = [v for v in VARIANTS if any(v in r.samples for r in results)]
    del times[max(1, (width - 26 - 10 * len(ratios)) // 13) :]
    for variant in times:
        table.add_column(f"\n{variant}", justify="right", no_wrap=True)
    memory = [v for v in ("ours", "eager", "compile") if any(v in r.peaks for r in results)]
    if width < 26 + 10 * len(ratios) + 13 * len(times) + 10 * len(memory):
        memory = []
    for variant in memory:
        table.add_column(f"MB beyond\n{variant}", justify="right", no_wrap=True)
    for result in results:
        cells = [ratio_cell(result.ratio(*pair), pair[0]) for pair in ratios]
        cells += [timed(result, variant) for variant in times]
        cells += [megabytes(result.excess(variant)) for variant in memory]
        table.add_row(escape(result.case.title), *cells)
    return table


def timed(result: Result, variant: str) -> str:
    spread = result.spread(variant)
    if spread is None:
        return MISSING
    return f"{clock(result.median(variant))} [dim]±{min(50 * spread, 99):2.0f}%[/]"


def megabytes(value: float | None) -> str:
    return MISSING if value is None else f"{max(value, 0.0):.1f}"


def sweep_tables(results: Sequence[Result]) -> list[Table]:
    """Loss and dtype down, size across."""
    sizes = {r.case.numel: r.case.title.rpartition(" ")[2] for r in results}
    rows: dict[tuple[str, str], dict[int, Result]] = {}
    for result in results:
        row = rows.setdefault((result.case.loss, result.case.dtype), {})
        row[result.case.numel] = result

    def table(title: str, cell: Callable[[Result], str]) -> Table:
        table = new_table(title)
        table.add_column("loss", no_wrap=True)
        table.add_column("dtype", no_wrap=True)
        for numel in sorted(sizes):
            table.add_column(sizes[numel], justify="right", no_wrap=True)
        for (loss, dtype), row in rows.items():
            cells = [cell(row[n]) if n in row else "" for n in sorted(sizes)]
            table.add_row(short(loss), dtype, *cells)
        return table

    found = []
    for variant, to in RATIOS[1:]:
        if any(variant in r.samples for r in results):

            def ratio(result: Result, variant: str = variant, to: str = to) -> str:
                return ratio_cell(result.ratio(variant, to), variant)

            found.append(table(f"{variant} / {to}, by the number of elements", ratio))
    return [*found, table("time of ours", lambda r: clock(r.median("ours")))]


def short(loss: str) -> str:
    return escape(loss.replace("binary_cross_entropy", "bce").replace("triplet_margin", "triplet"))


def means(results: Sequence[Result], group: str) -> dict[str, float | None]:
    """Geometric means of the ratios in a group, or in all.

    The yardstick is one for large tensors: small ones are a matter of calls, not of bytes.
    """
    chosen = [r for r in results if group in ("", r.case.group)]
    return {
        f"{variant} / {to}": geometric_mean(
            r.ratio(variant, to) for r in chosen if to == "ours" or r.case.group != "sweep"
        )
        for variant, to in RATIOS
    }


def means_table(results: Sequence[Result]) -> Table:
    table = new_table("Geometric means")
    every = means(results, "")
    table.add_column("")
    for name, value in every.items():
        if value is not None:
            table.add_column(name.replace("/ ", "/\n"), justify="right", no_wrap=True)
    for group, name in MEANS.items():
        found = means(results, group)
        if any(found.values()):
            cells = [ratio_cell(v, k.split()[0]) for k, v in found.items() if every[k] is not None]
            table.add_row(name, *cells)
    return table


def judged(
    results: Sequence[Result], targets: Sequence[Target] = TARGETS
) -> list[tuple[Target, float | None, str]]:
    """Each target, what was measured, and the word for it."""
    found = []
    for target in targets:
        value = target.measured(results)
        word = "not measured" if value is None else "met" if target.met(value) else "NOT MET"
        found.append((target, value, word))
    return found


def targets_table(results: Sequence[Result], targets: Sequence[Target] = TARGETS) -> Table:
    table = new_table("Targets")
    table.add_column("what")
    table.add_column("target", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("")
    colours = {"met": "green", "NOT MET": "red", "not measured": "dim"}
    for target, value, word in judged(results, targets):
        sign = "≥" if target.at_least else "≤"
        wanted = f"{sign} {target.bound:g}"
        table.add_row(target.text, wanted, figures(value), f"[{colours[word]}]{word}[/]")
    return table


def against_table(now: Sequence[Result], then: Sequence[Result]) -> Table:
    """Ours now and then, as it is and relative to eager."""
    names = ("time", "relative to eager", "then", "now", "")
    table = comparison("Now / then", names)
    for new, old, *ratios in compared(now, then):
        values = [v for v in ratios if v is not None]
        times = old.median("ours"), new.median("ours")
        table.add_row(
            *(escape(new.case.title), *map(figures, ratios), *map(clock, times), judge(values))
        )
    return table


def comparison(title: str, columns: Sequence[str]) -> Table:
    table = new_table(title)
    table.add_column("case", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def judge(ratios: Sequence[float], bound: float = SLOWER) -> str:
    """A case is slower where all ratios say so: one alone may be the machine."""
    slower, faster = min(ratios) > bound, max(ratios) < 1 / bound
    return SLOWER_WORD if slower else "[green]faster[/]" if faster else ""


def compared(
    now: Sequence[Result], then: Sequence[Result]
) -> list[tuple[Result, Result, float, float | None]]:
    """The results that both have, with the quotients of time and of time relative to eager."""
    earlier = {r.case.title: r for r in then}
    found = []
    for new in now:
        old = earlier.get(new.case.title)
        times = new.median("ours"), old and old.median("ours")
        if old is None or not times[0] or not times[1]:
            continue
        eager = new.ratio("ours", "eager"), old.ratio("ours", "eager")
        relative = eager[0] / eager[1] if eager[0] and eager[1] else None
        found.append((new, old, times[0] / times[1], relative))
    return found


def against_build(result: Result) -> tuple[float, float] | None:
    """This build's time over the other's: in the median round, and the shortest over the shortest."""
    median, shortest = result.ratio("new", "old"), result.shortest_ratio("new", "old")
    return (median, shortest) if median and shortest else None


def against_word(result: Result) -> str:
    ratios = against_build(result)
    return judge(ratios, SLOWER_BUILD) if ratios else ""


def builds_table(results: Sequence[Result]) -> Table:
    names = ("median", "shortest", "other", "this", "bits", "")
    table = comparison("This build / the other", names)
    for r in results:
        if ratios := against_build(r):
            times = (clock(r.median(v)) for v in ("old", "new"))
            bits = "same" if r.as_built else "[yellow]other[/]"
            shown = (f"{ratio:.3f}" for ratio in ratios)
            table.add_row(escape(r.case.title), *shown, *times, bits, against_word(r))
    return table


def slowest(results: Sequence[Result]) -> str:
    """The case whose smaller ratio is the largest."""
    found = [(min(ratios), r.case.title) for r in results if (ratios := against_build(r))]
    if not found:
        return "No case was measured with both builds."
    ratio, title = max(found)
    count = sum(each > SLOWER_BUILD for each, _ in found)
    return (
        f"The slowest against the other build: {ratio:.3f}, {escape(title)}; "
        f"{count} of {len(found)} above {SLOWER_BUILD}."
    )
