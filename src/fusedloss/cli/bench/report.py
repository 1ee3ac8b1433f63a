"""The HTML report of `fusedloss bench`, one file with its plots in it, and a picture of the ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .cases import VARIANTS
from .harness import Result
from .tables import MEANS, MISSING, RATIOS, clock, figures, judged, means, megabytes

BARS = ("ours", "compile", "eager")
LINES = ("yardstick", "eager", "compile", "ours")

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1c2330; --faint: #5d6778;
  --rule: #dfe3ea; --panel: #f6f7f9; --ours: #0a66c2; --eager: #d9480f; --compile: #9a5fb8;
  --yardstick: #8a93a3; --good: #18794e; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --text: #e6e9ef;
  --faint: #9aa4b5; --rule: #2d333d; --panel: #1b2027; --ours: #58a6ff; --eager: #ff8a5c;
  --compile: #c99be0; --yardstick: #8a93a3; --good: #4cc38a; --bad: #ff6b6b; } }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 1280px; background: var(--ground);
  color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; }
p { margin: .3rem 0; max-width: 75ch; } .faint, figcaption { color: var(--faint); }
.cards { display: flex; flex-wrap: wrap; gap: .9rem; margin: 1.4rem 0; }
.card { flex: 1 1 13rem; background: var(--panel); border-radius: .6rem; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 2rem; line-height: 1.2; color: var(--ours); }
td .faint { font-size: .9em; }
.wide { overflow-x: auto; } figure { margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .82rem; }
th, td { padding: .25rem .55rem; text-align: right; white-space: nowrap;
  vertical-align: top; line-height: 1.35; }
th { font-weight: 600; color: var(--faint); border-bottom: 1px solid var(--rule); }
td { border-bottom: 1px solid var(--rule); } .text { text-align: left; }
.good { color: var(--good); } .bad { color: var(--bad); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: .9rem; }
.grid figure { margin: 0; } summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .6rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); font-size: 11px; } svg .faint { fill: var(--faint); }
svg .name { font-size: 12.5px; font-weight: 600; }
.rule { stroke: var(--rule); } .one { stroke: var(--text); stroke-dasharray: 3 3; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin: .4rem 0; font-size: .88rem; }
.legend i { display: inline-block; width: 1.1rem; height: .32rem; margin-right: .45rem;
  vertical-align: middle; border-radius: 2px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .spread { stroke-width: 1; }
""" + "".join(
    f".{v} {{ stroke: var(--{v}); }} .fill-{v} {{ fill: var(--{v}); }} "
    f"i.{v} {{ background: var(--{v}); }}\n"
    for v in LINES
)


COLOURS = {"eager": "#cb181d", "compile": "#ef8a62"}


def picture(results: Sequence[Result], path: Path) -> None:
    """How many times as long PyTorch takes, a bar for each case."""
    from matplotlib.figure import Figure

    rows = [r for r in results if r.case.group != "sweep" and r.ratio("eager", "ours")][::-1]
    figure = Figure(figsize=(8, 1 + 0.38 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for k, (variant, colour) in enumerate(COLOURS.items()):
        found = [(y, q) for y, r in enumerate(rows) if (q := r.ratio(variant, "ours"))]
        places = [y + 0.2 - 0.4 * k for y, _ in found]
        drawn = axes.barh(places, [q - 1 for _, q in found], 0.38, left=1, color=colour)
        drawn.set_label(VARIANTS[variant])
        axes.bar_label(drawn, [f" {q:.1f}" for _, q in found], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [r.case.title for r in rows])
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time over that of fusedloss, forward and backward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def page(results: Sequence[Result], about: dict[str, Any]) -> str:
    cases = [r for r in results if r.case.group != "sweep"]
    points = [r for r in results if r.case.group == "sweep"]
    parts = [head(about), cards(results)]
    if cases:
        parts += [
            "<h2>Forward and backward, in units of the yardstick</h2>",
            "<p class=faint>The yardstick is an operation that moves the same bytes and computes "
            "next to nothing. Left of the line: a loss with its gradient takes less time than "
            "that.</p>",
            legend([v for v in BARS if any(v in r.samples for r in cases)]),
            f"<figure>{bars(cases)}</figure>",
            f"<div class=wide>{numbers(cases)}</div>",
        ]
    if points:
        parts += ["<h2>Time against size</h2>", *sweeps(points)]
    if any(value is not None for _, value, _ in judged(results)):
        parts += ["<h2>Targets</h2>", f"<div class=wide>{targets(results)}</div>"]
    parts += ["<h2>Geometric means</h2>", f"<div class=wide>{mean_rows(results)}</div>"]
    if about["notes"]:
        notes = "".join(f"<li>{escape(note)}</li>" for note in about["notes"])
        parts += ["<h2>Notes</h2>", f"<ul>{notes}</ul>"]
    parts += ["<h2>How it was measured</h2>", METHOD]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'><title>fusedloss bench</title>"
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


METHOD = """
<p>One call runs the loss forward and <code>backward()</code>, with <code>.grad</code> None before
and dropped after, as a training step does: autograd takes a new gradient over as it is, and copies
it only for a variant that cannot give it away. What a call allocates it frees, on the clock. Inputs
are leaves; all but a target receive gradients. Each case has a process of its own, forked from one
that never ran torch; small sizes of the sweep share one. In it the variants take turns, in a new
order each round: one call off the clock, then as many as fill a sample. Times are medians over the
rounds, ± half the interquartile range. A ratio is the median over the rounds of the quotient within
a round, so what slows the machine slows both sides.</p>
<p>Memory is the peak of resident memory in one call (VmHWM, reset just before it) less what was
resident before, less the size of the gradient, in a process for each variant whose threads have
started. Huge pages are off there, because they round each tensor up by as much as 2 MiB.</p>
"""


def head(about: dict[str, Any]) -> str:
    m, version = about["machine"], about["fusedloss"]
    commit = f" ({version['commit']})" if version["commit"] else ""
    lines = [
        f"fusedloss {version['version']}{commit}, torch {about['torch']}, "
        f"Python {about['python']}, {about['date']}",
        f"{m['cpu']}, {m['cores']} cores, {m['capability']}, threads: {m['threads']}, load at the "
        f"start: {m['load']}, huge pages: {m['huge_pages'] or 'unknown'}",
    ]
    if about["quick"]:
        lines.append("A quick run: fewer cases, sizes and samples.")
    if not about["complete"]:
        lines.append("The run was interrupted: this is what it had.")
    return "<h1>fusedloss bench</h1>" + "".join(f"<p class=faint>{escape(x)}</p>" for x in lines)


def cards(results: Sequence[Result]) -> str:
    group = "table" if any(r.case.group == "table" for r in results) else ""
    found = means(results, group)
    texts = {
        "eager / ours": "faster than PyTorch eager",
        "compile / ours": "faster than torch.compile",
        "ours / yardstick": "the time of an operation that only moves the same bytes",
    }
    cards = "".join(
        f"<div class=card><b>{figures(found[name])}&times;</b>{text}</div>"
        for name, text in texts.items()
        if found[name] is not None
    )
    return f"<div class=cards>{cards}</div><p class=faint>Geometric means {MEANS[group]}.</p>"


def legend(variants: Iterable[str]) -> str:
    items = "".join(f"<span><i class={v}></i>{VARIANTS[v]}</span>" for v in variants)
    return f"<div class=legend>{items}</div>"


def bars(results: Sequence[Result]) -> str:
    """Bars on a logarithmic axis that start where a variant takes as long as the yardstick."""
    rows = [(r, {v: q for v in BARS if (q := r.ratio(v, "yardstick"))}) for r in results]
    rows = [(r, found) for r, found in rows if found]
    if not rows:
        return ""
    values = [q for _, found in rows for q in found.values()]
    low = min(math.floor(math.log10(min(values)) * 2) / 2, -0.5)
    high = max(math.ceil(math.log10(max(values)) * 2) / 2, 0.5)
    left, right, thick, top = 190, 1050, 11, 28

    def x(value: float) -> float:
        return left + (right - left) * (math.log10(value) - low) / (high - low)

    body, y = [], float(top)
    for result, found in rows:
        middle = y + thick * len(found) / 2 + 4
        body.append(f"<text x=0 y={middle:.1f} class=name>{escape(result.case.title)}</text>")
        for variant, value in found.items():
            a, b = sorted((x(1.0), x(value)))
            after = f"x={b + 5:.1f}" if value >= 1 else f"x={a - 5:.1f} text-anchor=end"
            body.append(
                f"<rect x={a:.1f} y={y:.1f} width={max(b - a, 1):.1f} height={thick - 1} rx=1.5 "
                f"class=fill-{variant}><title>{VARIANTS[variant]}: {figures(value)} &times; "
                f"{escape(result.yardstick)}, {clock(result.median(variant))}</title></rect>"
                f"<text {after} y={y + thick - 1:.1f} class=faint>{figures(value)}</text>"
            )
            y += thick
        y += 9
    ticks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    for value in ticks:
        if not low <= math.log10(value) <= high:
            continue
        style = "one" if value == 1 else "rule"
        body.insert(
            0,
            f"<line x1={x(value):.1f} x2={x(value):.1f} y1={top - 6} y2={y:.1f} class={style} />"
            f"<text x={x(value):.1f} y=12 text-anchor=middle "
            f"class={'name' if value == 1 else 'faint'}>{value:g}&times;</text>",
        )
    return svg(1100, y + 4, body)


def svg(width: float, height: float, body: Iterable[str]) -> str:
    return f"<svg viewBox='0 0 {width:.0f} {height:.0f}' role=img>{''.join(body)}</svg>"


def numbers(results: Sequence[Result]) -> str:
    variants = [v for v in VARIANTS if any(v in r.samples for r in results)]
    memory = [v for v in BARS if any(v in r.peaks for r in results)]
    ratios = [f"{variant} /<br>{to}" for variant, to in RATIOS]
    heads = ["case", "yardstick", *ratios, *variants, *(f"{v}, MB<br>beyond" for v in memory)]
    rows = []
    for r in results:
        cells = [escape(r.case.title), escape(r.yardstick)]
        cells += [figures(r.ratio(*pair)) for pair in RATIOS]
        cells += [timed(r, v) for v in variants]
        rows.append([*cells, *(megabytes(r.excess(v)) for v in memory)])
    return table(heads, rows, texts=2)


def timed(result: Result, variant: str) -> str:
    spread = result.spread(variant)
    if spread is None:
        return MISSING
    time = clock(result.median(variant))
    return f"{time}<br><span class=faint>±{50 * spread:.0f}%</span>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        styled = (f"<{tag}{' class=text' * (k < texts)}>{c}" for k, c in enumerate(cells))
        return f"<tr>{''.join(styled)}"

    return f"<table>{line('th', heads)}{''.join(line('td', row) for row in rows)}</table>"


def targets(results: Sequence[Result]) -> str:
    colours = {"met": "good", "NOT MET": "bad"}
    rows = [
        (
            escape(target.text),
            f"{'≥' if target.at_least else '≤'} {target.bound:g}",
            figures(value),
            f"<span class={colours[word]}>{word.lower()}</span>",
        )
        for target, value, word in judged(results)
        if value is not None
    ]
    return table(("what", "target", "measured", ""), rows)


def mean_rows(results: Sequence[Result]) -> str:
    heads = ("", *(f"{variant} / {to}" for variant, to in RATIOS))
    found = {name: means(results, group) for group, name in MEANS.items()}
    rows = [
        (name, *map(figures, values.values()))
        for name, values in found.items()
        if any(values.values())
    ]
    return table(heads, rows)


def sweeps(points: Sequence[Result]) -> list[str]:
    """A panel for each loss; the first dtype's are open."""
    parts = [legend([v for v in LINES if any(v in r.samples for r in points)])]
    by_dtype: dict[str, dict[str, list[Result]]] = {}
    for point in points:
        by_dtype.setdefault(point.case.dtype, {}).setdefault(point.case.loss, []).append(point)
    for k, (dtype, losses) in enumerate(by_dtype.items()):
        times = [m for each in losses.values() for r in each for v in LINES if (m := r.median(v))]
        panels = "".join(
            f"<figure>{lines(loss, each, min(times), max(times))}</figure>"
            for loss, each in losses.items()
        )
        opened = " open" * (k == 0)
        parts.append(
            f"<details{opened}><summary>{dtype}</summary><div class=grid>{panels}</div></details>"
        )
    return parts


def lines(title: str, points: Sequence[Result], fastest: float, slowest: float) -> str:
    """Median time over the number of elements, both logarithmic, with interquartile ranges."""
    points = sorted(points, key=lambda r: r.case.numel)
    left, right, top, bottom = 52, 328, 30, 214
    low, high = math.floor(math.log10(fastest)), math.ceil(math.log10(slowest))
    first, last = (math.log2(points[k].case.numel) for k in (0, -1))

    def x(numel: int) -> float:
        return left + 8 + (right - left - 16) * (math.log2(numel) - first) / max(last - first, 1.0)

    def y(seconds: float) -> float:
        part = (math.log10(seconds) - low) / max(high - low, 1)
        return bottom - (bottom - top) * min(max(part, 0.0), 1.0)

    body = [f"<text x={left} y=16 class=name>{escape(title)}</text>"]
    for power in range(low, high + 1):
        at = y(10.0**power)
        body.append(
            f"<line x1={left} x2={right} y1={at:.1f} y2={at:.1f} class=rule />"
            f"<text x={left - 6} y={at + 4:.1f} text-anchor=end class=faint>{decade(power)}</text>"
        )
    edge = math.inf
    for point in reversed(points):
        at = x(point.case.numel)
        if at > edge - 28:
            continue  # its name would touch the one to the right
        edge = at
        name = escape(point.case.title.rpartition(" ")[2])
        body.append(
            f"<text x={at:.1f} y={bottom + 16} text-anchor=middle class=faint>{name}</text>"
        )
    for variant in LINES:
        found = [(r, q) for r in points if (q := r.quartiles(variant))]
        path = " ".join(f"{x(r.case.numel):.1f},{y(q[1]):.1f}" for r, q in found)
        body.append(f"<polyline points='{path}' class='line {variant}' />")
        for r, (a, median, b) in found:
            at = x(r.case.numel)
            body.append(
                f"<line x1={at:.1f} x2={at:.1f} y1={y(a):.1f} y2={y(b):.1f} "
                f"class='spread {variant}' /><circle cx={at:.1f} cy={y(median):.1f} r=3 "
                f"class=fill-{variant}><title>{VARIANTS[variant]}, {r.case.numel} elements: "
                f"{clock(median)} ({clock(a)} to {clock(b)})</title></circle>"
            )
    return svg(340, 240, body)


def decade(power: int) -> str:
    """The name of a power of ten of seconds."""
    unit = {0: "s", 1: "ms", 2: "µs", 3: "ns"}[min(max(-(power // 3), 0), 3)]
    scale = min(max(-(power // 3), 0), 3)
    return f"{10 ** (power + 3 * scale):g} {unit}"
