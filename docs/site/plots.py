"""The picture of a loss: its value and gradient, computed by it, as SVG that takes the page's colours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor

POINTS = 241
WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 10, 36

Curve = Callable[[Tensor], Tensor]  # of a row of abscissas, the loss at each


class Plot(NamedTuple):
    axis: str
    low: float
    high: float
    curves: dict[str, Curve]
    value: tuple[float, float] | None = None  # the ordinates that are shown; None: all
    slope: tuple[float, float] | None = None


class Line(NamedTuple):
    x: list[float]
    y: list[float]


def sampled(plot: Plot) -> tuple[list[Line], list[Line]]:
    """Values and slopes, in float64."""
    values, slopes = [], []
    # Off the ends, where a probability is 0 or 1.
    at = torch.linspace(plot.low, plot.high, POINTS + 2, dtype=torch.float64)[1:-1]
    for curve in plot.curves.values():
        x = at.clone().requires_grad_()
        y = curve(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        values.append(Line(at.tolist(), y.detach().tolist()))
        slopes.append(Line(at.tolist(), slope.tolist()))
    return values, slopes


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212")


def _panel(lines: Sequence[Line], plot: Plot, shown: tuple[float, float] | None, title: str) -> str:
    every = [y for line in lines for y in line.y if math.isfinite(y)]
    low, high = shown or (min(every), max(every))
    if not shown:
        room = 0.06 * (high - low) or 1.0
        low, high = low - room, high + room

    def px(x: float) -> float:
        return LEFT + (x - plot.low) / (plot.high - plot.low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ticks(low, high):
        parts.append(f'<path class="rule" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" class="end">{_label(y)}</text>')
    bottom = HEIGHT - BOTTOM
    for x in ticks(plot.low, plot.high):
        parts.append(f'<path class="rule" d="M{px(x):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{px(x):.1f}" y="{bottom + 15}" class="mid">{_label(x)}</text>')
    if low < 0 < high:
        parts.append(f'<path class="zero" d="M{LEFT} {py(0):.1f}H{WIDTH - RIGHT}"/>')
    for k, line in enumerate(lines):
        parts.append(f'<path class="curve c{k}" d="{_path(line, px, py, low, high)}"/>')
    axis = re.sub(r"_(\w)", r'<tspan class="sub" dy="3">\1</tspan>', escape(plot.axis))
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" class="mid axis">{axis}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _path(
    line: Line,
    px: Callable[[float], float],
    py: Callable[[float], float],
    low: float,
    high: float,
) -> str:
    """Broken where it is not finite, and cut where it leaves the panel."""
    parts, pen, room = [], False, high - low
    for x, y in zip(line.x, line.y, strict=True):
        inside = math.isfinite(y) and low - room < y < high + room
        if inside:
            clipped = min(max(y, low), high)
            parts.append(f"{'L' if pen else 'M'}{px(x):.1f} {py(clipped):.1f}")
        pen = inside
    return "".join(parts)


def figure(plot: Plot, value: str, slope: str) -> str:
    """HTML; `value` and `slope` are the titles of the panels."""
    values, slopes = sampled(plot)
    panels = [(value, values, plot.value), (slope, slopes, plot.slope)]
    drawn = "".join(
        f'<div class="panel"><p>{escape(title)}</p>{_panel(lines, plot, shown, title)}</div>'
        for title, lines, shown in panels
    )
    keys = "".join(
        f'<span><i class="c{k}"></i><code>{escape(label)}</code></span>'
        for k, label in enumerate(plot.curves)
    )
    legend = f'<div class="keys">{keys}</div>' if len(plot.curves) > 1 else ""
    return f'<figure class="plot"><div class="panels">{drawn}</div>{legend}</figure>'
