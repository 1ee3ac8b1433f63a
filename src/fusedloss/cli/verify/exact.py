"""The losses with 50 digits: what `fusedloss verify` holds every path against.

A pointwise formula runs as it is written, over a namespace `m` of mpmath. Losses over rows have a
reference of their own here. With each result comes its `unit`: how far a rounding of each input moves
it, zeros and ones apart, which are labels and exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from mpmath import MPContext
from torch import Tensor

from ...core import reduce
from ...kinds import Call
from ...kinds.formula import rebound
from ...kinds.margins import MarginCall
from ...kinds.names import CONSTANTS, FUNCTIONS
from ...kinds.pointwise import PointwiseCall
from ...kinds.reduction import Distances, ReductionCall, Sums
from ...kinds.rows import RowsCall

DIGITS = 50
mp = MPContext()
mp.dps = DIGITS + 15  # for what formulas as written lose

Number = Any  # an mpf
Results = list[Number]  # the value, then the derivatives


class Exact(NamedTuple):
    """A result as the sum of two float64 tensors, and its unit."""

    high: Tensor
    low: Tensor
    unit: Tensor

    def at(self, shape: Sequence[int]) -> Exact:
        return Exact(*(part.reshape(tuple(shape)) for part in self))


def exp(a: Number) -> Number:
    return mp.exp(a)


def log(a: Number) -> Number:
    return mp.log(a) if a > 0 else -mp.inf if a == 0 else mp.nan


def log1p(a: Number) -> Number:
    return mp.log1p(a) if a > -1 else -mp.inf if a == -1 else mp.nan


def log_or_zero(a: Number) -> Number:
    return mp.mpf(0) if a == 0 else log(a)


def sigmoid(a: Number) -> Number:
    return 1 / (1 + mp.exp(-a))


def log_sigmoid(a: Number) -> Number:
    return a if a == -mp.inf else -mp.log1p(mp.exp(-a))


def sqrt(a: Number) -> Number:
    return mp.sqrt(a) if a >= 0 else mp.nan


def maximum(a: Number, b: Number) -> Number:
    return mp.nan if mp.isnan(a) or mp.isnan(b) else mp.mpf(max(a, b))


def at_least(a: Number, b: Number) -> Number:
    return maximum(a, b)


def pow(a: Number, b: Number) -> Number:
    return mp.power(a, b) if a >= 0 else mp.nan


def where(condition: bool, a: Number, b: Number) -> Number:
    return mp.mpf(a if condition else b)


inf = mp.inf
# What `m` means to a formula here.
m = SimpleNamespace(
    abs=abs, **{name: globals()[name] for name in (*FUNCTIONS, *CONSTANTS) if name != "abs"}
)


def reference(call: Call, tensors: Sequence[Tensor | None]) -> list[Exact]:
    """The unreduced losses of a call, and their gradients by the tensors that it differentiates by."""
    given = [t for t in tensors if t is not None and t.is_floating_point()]
    info = torch.finfo(reduce.wide(*given))
    with mp.workdps(mp.dps):
        if isinstance(call, PointwiseCall):
            return _pointwise(call, tensors, info)
        if isinstance(call, RowsCall):
            return _rows(call, tensors, info)
        if isinstance(call, MarginCall):
            return _margins(call, tensors, info)
        assert isinstance(call, ReductionCall)  # CTC is in sequences.py, overlaps in theirs
        return _reductions(call, tensors, info)


def numbers(tensor: Tensor) -> Any:
    """As nested lists of mpf."""
    values = tensor.double().tolist()

    def convert(v: Any) -> Any:
        return [convert(each) for each in v] if isinstance(v, list) else mp.mpf(v)

    return convert(values)


def _collect(rows: Iterator[tuple[Results, Results]]) -> list[Exact]:
    """One `Exact` a column, from rows of (results, units)."""
    found = list(rows)
    results = list(zip(*(r for r, _ in found), strict=True))
    units = list(zip(*(u for _, u in found), strict=True))
    return [pack(r, u) for r, u in zip(results, units, strict=True)]


def pack(results: Sequence[Number], units: Sequence[Number]) -> Exact:
    high = [float(r) for r in results]
    low = [float(r - h) if math.isfinite(h) else 0.0 for r, h in zip(results, high, strict=True)]
    unit = [float(u) if mp.isfinite(u) else 0.0 for u in units]
    return Exact(*(torch.tensor(part, dtype=torch.float64) for part in (high, low, unit)))


def rounding(a: Number, info: torch.finfo) -> Number:
    if a in (0, 1, -1) or not mp.isfinite(a):
        return mp.mpf(0)
    return max(abs(a), mp.mpf(info.smallest_normal)) * info.eps


def _pointwise(
    call: PointwiseCall, tensors: Sequence[Tensor | None], info: torch.finfo
) -> list[Exact]:
    *operands, weight = tensors
    present = [t for t in (*operands, weight) if t is not None]
    shape = torch.broadcast_shapes(*(t.shape for t in present))
    columns = [numbers(t.expand(shape).flatten()) for t in present]
    value, grad, _ = call.formula.over(m)
    settings = dict(zip(call.formula.params, call.params, strict=True))

    def results(point: Sequence[Number]) -> Results:
        w = 1 if weight is None else point[-1]
        arguments = point if weight is None else point[:-1]
        slopes = grad(*arguments, **settings)
        return [w * value(*arguments, **settings), *(w * slope for slope in slopes)]

    def row(point: tuple[Number, ...]) -> tuple[Results, Results]:
        here = results(point)
        units = [mp.mpf(0)] * len(here)
        for k, a in enumerate(point):
            if step := rounding(a, info):
                # Towards 0: a probability stays one.
                moved = results([*point[:k], a - mp.sign(a) * step, *point[k + 1 :]])
                units = [u + abs(b - h) for u, b, h in zip(units, moved, here, strict=True)]
        return here, units

    return [part.at(shape) for part in _collect(map(row, zip(*columns, strict=True)))]


def _rows(call: RowsCall, tensors: Sequence[Tensor | None], info: torch.finfo) -> list[Exact]:
    input, target, weight = tensors
    assert input is not None and target is not None
    classes = input.shape[1]
    x = numbers(input)
    w = [mp.mpf(1)] * classes if weight is None else numbers(weight)
    zeros = [mp.mpf(0)] * classes
    values, by_input, by_target = [], [], []
    for row, chosen in zip(
        x, numbers(target) if call.probabilities else target.tolist(), strict=True
    ):
        if not call.probabilities and chosen == call.ignore_index:
            values.append((zeros[0], zeros[0]))
            by_input.append((zeros, zeros))
        elif call.loss == "nll_loss":
            slope = [-w[c] * (c == chosen) for c in range(classes)]
            values.append((-w[chosen] * row[chosen], zeros[0]))
            by_input.append((slope, zeros))
        else:
            one_hot = [mp.mpf(c == chosen) for c in range(classes)]
            found = _softmax_row(row, chosen if call.probabilities else one_hot, w, call, info)
            values.append(found[0])
            by_input.append(found[1])
            by_target.append(found[2])
    exact = [pack([v for v, _ in values], [u for _, u in values])]
    for rows in (by_input, by_target if call.probabilities else []):
        if rows:
            flat = pack([a for r, _ in rows for a in r], [u for _, us in rows for u in us])
            exact.append(flat.at(input.shape))
    return exact


def _softmax_row(
    x: Results, q: Results, w: Results, call: RowsCall, info: torch.finfo
) -> tuple[tuple[Number, Number], tuple[Results, Results], tuple[Results, Results]]:
    """Cross entropy of one row: value, gradient by x, gradient by q; each with its unit."""
    h, classes = mp.mpf(call.smoothing), range(len(x))
    if call.gamma:
        return _focal_row(x, q, w, call, info)
    shares = [(1 - h) * wc for wc in w]  # what a probability weighs
    b = [s * qc + h / len(x) * wc for s, qc, wc in zip(shares, q, w, strict=True)]
    top = max(x)
    top = top if mp.isfinite(top) else mp.mpf(0)
    e = [mp.exp(a - top) for a in x]
    total = mp.fsum(e)
    lse = top + log(total)
    p = [a / total for a in e]
    mass = mp.fsum(b)
    value = mp.fsum(bc * (lse - a) for bc, a in zip(b, x, strict=True) if bc != 0)
    slope = [mass * pc - bc for pc, bc in zip(p, b, strict=True)]
    dx = [rounding(a, info) for a in x]
    dq = [s * rounding(a, info) for s, a in zip(shares, q, strict=True)]
    spread = mp.fsum(pc * d for pc, d in zip(p, dx, strict=True))
    lost = mp.fsum(dq)
    by_q = [
        s * (lse - a) if bc != 0 or a != -mp.inf else mp.mpf(0)
        for s, a, bc in zip(shares, x, b, strict=True)
    ]
    value_unit = mp.fsum(abs(s) * d for s, d in zip(slope, dx, strict=True))
    value_unit += mp.fsum(d * abs(lse - a) for d, a in zip(dq, x, strict=True) if d != 0)
    # d slope_c / d x_k = B p_c ([c = k] - p_k), d slope_c / d q_k = s_k (p_c - [c = k])
    slope_unit = [
        mass * p[c] * (spread + (1 - 2 * p[c]) * dx[c]) + p[c] * lost + (1 - 2 * p[c]) * dq[c]
        for c in classes
    ]
    q_unit = [s * (spread + (1 - 2 * pc) * d) for s, pc, d in zip(shares, p, dx, strict=True)]
    return (value, value_unit), (slope, slope_unit), (by_q, q_unit)


def others(terms: Results) -> Results:
    """The sum of all but each: of all but the largest as it stands, or its digits would be lost."""
    total = mp.fsum(terms)
    top = max(range(len(terms)), key=lambda k: abs(terms[k]))
    rest = mp.fsum(t for k, t in enumerate(terms) if k != top)
    return [rest if k == top else total - t for k, t in enumerate(terms)]


def _focal_row(
    x: Results, q: Results, w: Results, call: RowsCall, info: torch.finfo
) -> tuple[tuple[Number, Number], tuple[Results, Results], tuple[Results, Results]]:
    """The same of the focal loss, of class indices: no gradient by q."""
    h, g = mp.mpf(call.smoothing), mp.mpf(call.gamma)
    b = [((1 - h) * qc + h / len(x)) * wc for qc, wc in zip(q, w, strict=True)]

    top = max((a for a in x if a != -mp.inf), default=mp.mpf(0))
    none = mp.mpf(0)

    def results(x: Results, e: Results) -> Results:
        total = mp.fsum(e)
        p = [a / total for a in e]
        rest = [a / total for a in others(e)]
        lse = top + log(total)
        losses, part = [none] * len(x), [none] * len(x)
        for c in (c for c in counted if rest[c]):
            surprise, focus = lse - x[c], rest[c] ** g
            ratio = p[c] * surprise / rest[c] if p[c] else none
            losses[c] = b[c] * focus * surprise
            # b_c (1 - p_c)^g (1 + g p_c surprise_c / (1 - p_c)) takes the place of b_c in the gradient
            part[c] = b[c] * focus * (1 + g * ratio)
        slopes = [pc * o - r * k for pc, o, r, k in zip(p, others(part), rest, part, strict=True)]
        return [mp.fsum(losses), *slopes]

    counted = [c for c, share in enumerate(b) if share]
    e = [mp.exp(a - top) for a in x]
    here = results(x, e)
    units = [none] * len(here)
    for k, a in enumerate(x):
        if step := rounding(a, info):
            to = a - mp.sign(a) * step
            moved = results([*x[:k], to, *x[k + 1 :]], [*e[:k], mp.exp(to - top), *e[k + 1 :]])
            units = [u + abs(b - h) for u, b, h in zip(units, moved, here, strict=True)]
    return (here[0], units[0]), (here[1:], units[1:]), ([], [])


def _margins(call: MarginCall, tensors: Sequence[Tensor | None], info: torch.finfo) -> list[Exact]:
    input, target, weight = tensors
    assert input is not None and target is not None
    classes, found = input.shape[1], []
    w = None if weight is None else numbers(weight)
    for x, given in zip(numbers(input), target.reshape(len(input), -1).tolist(), strict=True):
        labels = given[: given.index(-1)] if call.sets and -1 in given else given
        share = (mp.mpf(1) if w is None else w[labels[0]]) / classes
        found.append(_margin_row(x, labels, share, call, info))
    exact = [pack([v for (v, _), _ in found], [u for (_, u), _ in found])]
    slopes = [s for _, row in found for s, _ in row]
    return [*exact, pack(slopes, [u for _, row in found for _, u in row]).at(input.shape)]


def _margin_row(
    x: Results, labels: list[int], share: Number, call: MarginCall, info: torch.finfo
) -> tuple[tuple[Number, Number], list[tuple[Number, Number]]]:
    """The value and the gradient of one row, each number with its unit."""
    dx = [rounding(a, info) for a in x]
    value, slope, unit = mp.mpf(0), [mp.mpf(0)] * len(x), [mp.mpf(0)] * len(x)
    for y in labels:
        for c in set(range(len(x))) - set(labels):
            gap = mp.mpf(call.margin) - x[y] + x[c]
            if gap > 0:
                value += share * (gap * gap if call.squared else gap)
                by = share * (2 * gap if call.squared else 1)
                moved = 2 * abs(share) * (dx[y] + dx[c]) if call.squared else 0
                for k, sign in ((c, 1), (y, -1)):
                    slope[k] += sign * by
                    unit[k] += moved
    lost = mp.fsum(abs(s) * d for s, d in zip(slope, dx, strict=True))
    return (value, lost), list(zip(slope, unit, strict=True))


class _Distance(NamedTuple):
    """|a - b + eps|_p and its derivative by a, each with its unit."""

    length: Number
    unit: Number
    slope: Results
    slope_unit: Results


def _distance(a: Results, b: Results, p: float, eps: float, info: torch.finfo) -> _Distance:
    v = [s - t + mp.mpf(eps) for s, t in zip(a, b, strict=True)]
    moved = [rounding(s, info) + rounding(t, info) for s, t in zip(a, b, strict=True)]
    size = [abs(d) for d in v]
    zeros = [mp.mpf(0)] * len(v)
    top = max(size)
    if top == 0:
        return _Distance(top, mp.fsum(moved), zeros, zeros)
    if math.isinf(p):
        ties = sum(s == top for s in size)
        slope = [mp.sign(d) * (s == top) / ties for d, s in zip(v, size, strict=True)]
        return _Distance(top, max(moved), slope, zeros)
    p = mp.mpf(p)
    length = mp.fsum(s**p for s in size if s) ** (1 / p)
    ratio = [s / length for s in size]
    slope = [mp.sign(d) * r ** (p - 1) if r else mp.mpf(0) for d, r in zip(v, ratio, strict=True)]
    unit = mp.fsum(abs(g) * d for g, d in zip(slope, moved, strict=True))
    # d slope_i / d v_j = (p - 1) / |v| (|v_i / |v||^(p-2) [i = j] - slope_i slope_j)
    units = [
        abs(p - 1) / length * ((r ** (p - 2) * d if r else 0) + abs(g) * unit)
        for r, d, g in zip(ratio, moved, slope, strict=True)
    ]
    return _Distance(length, unit, slope, units)


Row = tuple[
    Number, Number, list[Results], list[Results]
]  # the value and its unit, the gradients and theirs


def _reductions(
    call: ReductionCall, tensors: Sequence[Tensor | None], info: torch.finfo
) -> list[Exact]:
    operands, label = call.split(tensors)
    operands = torch.broadcast_tensors(*(t for t in operands if t is not None))
    rows = zip(*(numbers(t) for t in operands), strict=True)
    labels = [None] * len(operands[0]) if label is None else numbers(label)
    of_row = _row_of_sums if isinstance(call.record.measure, Sums) else _row_of_distances
    found = [of_row(call, info, row, label) for row, label in zip(rows, labels, strict=True)]
    exact = [pack([value for value, *_ in found], [unit for _, unit, *_ in found])]
    for k in range(len(operands)):
        slopes = [g for _, _, each, _ in found for g in each[k]]
        units = [u for *_, each in found for u in each[k]]
        exact.append(pack(slopes, units).at((len(found), -1)))
    return exact


def _projected(call: ReductionCall, measures: Results, label: Number | None) -> Results:
    """The loss of one row, and its derivatives by the measures."""
    projection = call.record.projection
    named = dict(zip(call.record.params, call.numbers, strict=True))
    settings = {name: mp.mpf(named[name]) for name in projection.params}
    given = measures if label is None else [*measures, label]
    value, grad, _ = projection.over(m)
    return [value(*given, **settings), *grad(*given, **settings)[: len(measures)]]


def _row_of_sums(
    call: ReductionCall, info: torch.finfo, row: tuple[Results, ...], label: Number | None
) -> Row:
    measure = call.record.measure
    assert isinstance(measure, Sums)
    named = dict(zip(call.record.params, call.numbers, strict=True))
    settings = {name: mp.mpf(named[name]) for name in measure.params}
    term, slope = rebound(measure.map, m), rebound(measure.slope, m)

    def results(row: Sequence[Results]) -> Results:
        terms = [term(*place, **settings) for place in zip(*row, strict=True)]
        sums = [mp.fsum(column) for column in zip(*terms, strict=True)]
        value, *by = _projected(call, sums, label)
        slopes = [slope(*place, *by, **settings) for place in zip(*row, strict=True)]
        return [value, *(d for column in zip(*slopes, strict=True) for d in column)]

    here = results(row)
    units = [mp.mpf(0)] * len(here)
    for k, operand in enumerate(row):
        for i, a in enumerate(operand):
            if step := rounding(a, info):
                near = [*operand[:i], a - mp.sign(a) * step, *operand[i + 1 :]]
                moved = results([*row[:k], near, *row[k + 1 :]])
                units = [u + abs(b - h) for u, b, h in zip(units, moved, here, strict=True)]
    n = len(row[0])
    cut = [slice(1 + k * n, 1 + (k + 1) * n) for k in range(len(row))]
    return here[0], units[0], [here[c] for c in cut], [units[c] for c in cut]


def _row_of_distances(
    call: ReductionCall, info: torch.finfo, row: tuple[Results, ...], label: Number | None
) -> Row:
    measure = call.record.measure
    assert isinstance(measure, Distances)
    p, eps = call.numbers[:2]
    found = [_distance(row[i], row[j], p, eps, info) for i, j in measure.pairs]
    value, *by = _projected(call, [d.length for d in found], label)
    zeros = [mp.mpf(0)] * len(row[0])
    slopes, units = [zeros] * len(row), [zeros] * len(row)
    for d, (plus, minus), b in zip(found, measure.pairs, by, strict=True):
        for k, side in ((plus, b), (minus, -b)):
            slopes[k] = [s + side * g for s, g in zip(slopes[k], d.slope, strict=True)]
            units[k] = [s + abs(b) * u for s, u in zip(units[k], d.slope_unit, strict=True)]
    return value, mp.fsum(abs(b) * d.unit for b, d in zip(by, found, strict=True)), slopes, units
