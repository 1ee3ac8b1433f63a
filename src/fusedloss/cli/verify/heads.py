"""The losses of heads with many digits: logits are the exact products of the given tensors.

The unit of a result is what a rounding of each term of a logit, of each capped logit and of each target
does to it, and in a gradient one of each of its terms; they are roundings of the inputs' type, in which
the products are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall
from .exact import Exact, Number, Results, mp, numbers, pack, rounding

Rows = list[Results]


class Row(NamedTuple):
    """What a row's loss is made of: logits as they are capped, of student and teacher, and a target."""

    x: Results
    teacher: Results
    target: Results  # probabilities


def heads(call: LinearCall, tensors: Sequence[Tensor | None]) -> list[Exact]:
    """The rows' results, and their sum's gradients: by input, weight, target if it is one, and bias."""
    input, weight, bias, target, class_weight, sample_weight, _, *teacher = tensors
    assert input is not None and weight is not None
    info = torch.finfo(input.dtype)
    h, w = numbers(input), numbers(weight[:, 0])
    x, moved = _logits(h, w, bias, info, call.logit_scale)
    count, classes = range(len(x)), range(len(w))
    theirs, theirs_moved = _teachers(teacher, info)
    class_weights = [mp.mpf(1)] * len(w) if class_weight is None else numbers(class_weight)
    sign = -1 if call.loss == "linear_log_prob" else 1
    values, slopes, by_target = [], [], []  # each with its unit
    for n in count:
        v = sign * (mp.mpf(1) if sample_weight is None else numbers(sample_weight[n])[0])
        own, own_moved = _capped(x[n], moved[n], call.softcap, info)
        cap = getattr(call, "teacher_softcap", 0.0)
        their, their_moved = _capped(theirs[n], theirs_moved[n], cap, info) if theirs else ([], [])
        goal, goal_moved = _target(call, target, n, len(w), info)
        row, steps = Row(own, their, goal), Row(own_moved, their_moved, goal_moved)
        counted = call.probabilities or target is None or int(target[n, 0]) != call.ignore_index
        found = _with_units(call, row, steps, class_weights, counted)
        values.append(_times(found[0], v))
        slopes.append([_times(g, v * call.logit_scale) for g in found[1 : 1 + len(w)]])
        by_target += [_times(g, v) for g in found[1 + len(w) :]]
    features = range(input.shape[1])
    by_input = [
        _dot([(slopes[n][c], w[c][d]) for c in classes], info) for n in count for d in features
    ]
    by_weight = [
        _dot([(slopes[n][c], h[n][d]) for n in count], info) for c in classes for d in features
    ]
    exact = [
        _packed(values),
        _packed(by_input).at(input.shape),
        _packed(by_weight).at((len(w), -1)),
    ]
    if by_target:
        exact.append(_packed(by_target).at((len(x), -1)))
    if bias is not None:
        one = mp.mpf(1)
        exact.append(_packed([_dot([(slopes[n][c], one) for n in count], info) for c in classes]))
    return exact


def _packed(pairs: Sequence[tuple[Number, Number]]) -> Exact:
    return pack([r for r, _ in pairs], [u for _, u in pairs])


def _times(pair: tuple[Number, Number], factor: Number) -> tuple[Number, Number]:
    return pair[0] * factor, pair[1] * abs(factor)


def _dot(
    terms: Sequence[tuple[tuple[Number, Number], Number]], info: torch.finfo
) -> tuple[Number, Number]:
    return (
        mp.fsum(g * a for (g, _), a in terms),
        mp.fsum((unit + rounding(g, info)) * abs(a) for (g, unit), a in terms),
    )


def _logits(
    h: Rows, w: Rows, bias: Tensor | None, info: torch.finfo, scale: float = 1.0
) -> tuple[Rows, Rows]:
    """The logits, and what roundings of their terms may do to them."""
    b = [mp.mpf(0)] * len(w) if bias is None else [v[0] for v in numbers(bias)]
    factor, eps = mp.mpf(scale), mp.mpf(info.eps)
    terms = [[[p * q for p, q in zip(row, c, strict=True)] for c in w] for row in h]
    x = [[factor * (mp.fsum(t) + bc) for t, bc in zip(row, b, strict=True)] for row in terms]
    moved = [
        [abs(factor) * eps * (mp.fsum(map(abs, t)) + abs(bc)) for t, bc in zip(row, b, strict=True)]
        for row in terms
    ]
    return x, moved


def _teachers(teacher: Sequence[Tensor | None], info: torch.finfo) -> tuple[Rows, Rows]:
    if not teacher:
        return [], []
    input, weight, bias, logits = teacher
    if logits is not None:
        x = numbers(logits)
        return x, [[rounding(a, info) for a in row] for row in x]
    assert input is not None and weight is not None
    return _logits(numbers(input), numbers(weight[:, 0]), bias, info)


def _capped(
    x: Results, moved: Results, softcap: float, info: torch.finfo
) -> tuple[Results, Results]:
    if not softcap:
        return x, moved
    k = mp.mpf(softcap)
    found = [k * mp.tanh(a / k) for a in x]
    eps = mp.mpf(info.eps)
    steps = [(1 - (a / k) ** 2) * m + eps * abs(a) for a, m in zip(found, moved, strict=True)]
    return found, steps


def _target(
    call: LinearCall, target: Tensor | None, n: int, classes: int, info: torch.finfo
) -> tuple[Results, Results]:
    if target is None:
        return [], []
    if call.probabilities:
        q = [v[0] for v in numbers(target[n])]
        return q, [rounding(a, info) for a in q]
    chosen = int(target[n, 0])
    return [mp.mpf(c == chosen) for c in range(classes)], [mp.mpf(0)] * classes


def _with_units(
    call: LinearCall, row: Row, steps: Row, weights: Results, counted: bool
) -> list[tuple[Number, Number]]:
    """The loss, its gradient by the logits, and by a target that is one; each with its unit."""
    results = _divergence if isinstance(call, DistillCall) else _cross_entropy
    here = results(call, row, weights)
    if not counted:
        return [(mp.mpf(0), mp.mpf(0))] * len(here)
    units = [mp.mpf(0)] * len(here)
    for part, values in enumerate(row):
        for k, step in enumerate(steps[part]):
            if step:
                own = [*values[:k], values[k] - mp.sign(values[k]) * step, *values[k + 1 :]]
                other = results(call, row._replace(**{row._fields[part]: own}), weights)
                units = [u + abs(a - b) for u, a, b in zip(units, here, other, strict=True)]
    return list(zip(here, units, strict=True))


def _log_softmax(x: Results) -> Results:
    top = max(x)
    lse = top + mp.log(mp.fsum(mp.exp(a - top) for a in x))
    return [a - lse for a in x]


def _cross_entropy(call: LinearCall, row: Row, weights: Results) -> Results:
    h, size, z = mp.mpf(call.smoothing), len(row.x), mp.mpf(call.z_loss)
    log_p = _log_softmax(row.x)
    p, lse = [mp.exp(a) for a in log_p], row.x[0] - log_p[0]
    b = [(1 - h) * w * q + h / size * w for w, q in zip(weights, row.target, strict=True)]
    value = -mp.fsum(s * a for s, a in zip(b, log_p, strict=True)) + z * lse**2
    even = mp.fsum(b) + 2 * z * lse
    slope = [even * pc - s for pc, s in zip(p, b, strict=True)]
    by_target = [-(1 - h) * w * a for w, a in zip(weights, log_p, strict=True)]
    return [value, *_uncapped(call, row.x, slope), *(by_target if call.probabilities else [])]


def _divergence(call: Any, row: Row, _: Results) -> Results:
    beta, by = mp.mpf(call.beta), 1 / mp.mpf(call.temperature)
    ls, lt = (_log_softmax([a * by for a in x]) for x in (row.x, row.teacher))
    s, t = [mp.exp(a) for a in ls], [mp.exp(a) for a in lt]

    def mean(p: Results, a: Results, b: Results) -> Number:
        return mp.fsum(w * (u - v) for w, u, v in zip(p, a, b, strict=True))

    if call.divergence == "forward":
        value, slope = mean(t, lt, ls), [p - q for p, q in zip(s, t, strict=True)]
    else:
        share, other = mp.mpf(1), lt
        if call.divergence == "js":
            share = 1 - beta
            other = [mp.log(beta * q + share * p) for p, q in zip(s, t, strict=True)]
        value = share * (reverse := mean(s, ls, other))
        slope = [share * p * (a - b - reverse) for p, a, b in zip(s, ls, other, strict=True)]
        if call.divergence == "js":
            value += beta * mean(t, lt, other)
    soft, hard = mp.mpf(call.soft_weight), mp.mpf(call.hard_weight)
    value, slope = soft * value, [soft * by * g for g in slope]
    if row.target:
        own = _log_softmax(row.x)
        value -= hard * mp.fsum(q * a for q, a in zip(row.target, own, strict=True))
        slope = [g + hard * (mp.exp(a) - q) for g, a, q in zip(slope, own, row.target, strict=True)]
    return [value, *_uncapped(call, row.x, slope)]


def _uncapped(call: LinearCall, x: Results, slope: Results) -> Results:
    if not call.softcap:
        return slope
    return [g * (1 - (a / mp.mpf(call.softcap)) ** 2) for g, a in zip(slope, x, strict=True)]
