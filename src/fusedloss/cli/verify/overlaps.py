"""Losses of overlaps with 50 digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import reduce
from ...kinds.dice import DiceCall
from .exact import Exact, Number, Results, mp, numbers, others, pack, rounding


class Place(NamedTuple):
    """One position of an image: logits, masks and what counts of them, by class."""

    group: int
    x: Results
    t: Results
    counts: list[bool]


def reference(call: DiceCall, tensors: Sequence[Tensor | None]) -> list[Exact]:
    """The losses, and the gradients of their sum. A rounding of a logit moves its own place's alone."""
    input, target, weight = tensors
    assert input is not None and target is not None
    info = torch.finfo(reduce.wide(input))
    places = _places(call, input, target)
    classes = range(0 if call.background else 1, input.shape[1])
    w = [mp.mpf(1)] * input.shape[1] if weight is None else numbers(weight)
    groups = 1 if call.batch else input.shape[0]
    zeros = [mp.mpf(0)] * input.shape[1]
    sums = [[list(zeros) for _ in range(3)] for _ in range(groups)]
    shares = [_probabilities(call, place.x) for place in places]
    for place, (p, rest) in zip(places, shares, strict=True):
        for c in classes:
            if place.counts[c]:
                both, wrong, missed = sums[place.group]
                both[c] += p[c] * place.t[c]
                wrong[c] += p[c] * (1 - place.t[c])
                missed[c] += rest[c] * place.t[c]
    values, slopes = zip(*(_group(call, s, w, classes) for s in sums), strict=True)

    def gradient(place: Place, x: Results) -> Results:
        p, rest = _probabilities(call, x)
        inside, outside = slopes[place.group]
        v = [
            t * a + (1 - t) * b if counts else mp.mpf(0)
            for t, a, b, counts in zip(place.t, inside, outside, place.counts, strict=True)
        ]
        if call.activation == "none":
            return v
        if call.activation == "sigmoid":
            return [each * a * b for each, a, b in zip(v, p, rest, strict=True)]
        terms = others([each * a for each, a in zip(v, p, strict=True)])
        return [a * (each * b - o) for a, b, each, o in zip(p, rest, v, terms, strict=True)]

    grads, units = [], []
    value_unit = [[mp.mpf(0)] * len(v) for v in values]
    for place in places:
        here = gradient(place, place.x)
        unit = [mp.mpf(0)] * len(here)
        for k, a in enumerate(place.x):
            if step := rounding(a, info):
                moved = gradient(place, [*place.x[:k], a - mp.sign(a) * step, *place.x[k + 1 :]])
                unit = [u + abs(b - h) for u, b, h in zip(unit, moved, here, strict=True)]
                value_unit[place.group] = [u + abs(here[k]) * step for u in value_unit[place.group]]
        grads.append(here)
        units.append(unit)
    flat = [v for each in values for v in each]
    shape = call.shape(input)
    found = [pack(flat, [u for each in value_unit for u in each]).at(shape)]
    columns = (input.shape[0], -1, input.shape[1])
    exact = pack([g for each in grads for g in each], [u for each in units for u in each])
    of_input = [part.reshape(columns).movedim(-1, 1).reshape(input.shape) for part in exact]
    return [*found, Exact(*of_input)]


def _places(call: DiceCall, input: Tensor, target: Tensor) -> Sequence[Place]:
    found = []
    for n, (x, t) in enumerate(zip(input, target, strict=True)):
        columns = numbers(x.reshape(len(x), -1).t())
        classes = range(len(x))
        if call.masks:
            masks = t.reshape(len(x), -1).t()
            counts = (masks != call.ignore_index).tolist()
            each = numbers(masks)
        else:
            labels = t.reshape(-1).tolist()
            counts = [[y != call.ignore_index] * len(x) for y in labels]
            each = [[mp.mpf(y == c) for c in classes] for y in labels]
        group = 0 if call.batch else n
        found += [Place(group, *row) for row in zip(columns, each, counts, strict=True)]
    return found


def _probabilities(call: DiceCall, x: Results) -> tuple[Results, Results]:
    """p and 1 - p."""
    if call.activation == "none":
        return x, [1 - a for a in x]
    if call.activation == "sigmoid":
        return [1 / (1 + mp.exp(-a)) for a in x], [1 / (1 + mp.exp(a)) for a in x]
    top = max(x)
    e = [mp.exp(a - (top if mp.isfinite(top) else 0)) for a in x]
    total = mp.fsum(e)
    return [a / total for a in e], [a / total for a in others(e)]


def _group(
    call: DiceCall, sums: list[Results], w: Results, classes: range
) -> tuple[Results, tuple[Results, Results]]:
    """The losses of one group; and their derivatives by p where t is 1 and where it is 0, by class."""
    alpha, beta = mp.mpf(call.alpha), mp.mpf(call.beta)
    nr, dr = mp.mpf(call.smooth_nr), mp.mpf(call.smooth_dr)
    more = dr - nr
    both, wrong, missed = sums
    size = [a + b for a, b in zip(both, missed, strict=True)]
    apart = [alpha * a + beta * b for a, b in zip(wrong, missed, strict=True)]
    inside, outside = [mp.mpf(0)] * len(w), [mp.mpf(0)] * len(w)
    values: Results = []

    def derive(c: int, share: Number, above: Number, below: Number, scale: Number) -> None:
        if below:
            by_apart = share / below**2
            inside[c] = scale * (-above / below**2 - beta * by_apart)
            outside[c] = scale * alpha * by_apart

    if call.weighting == "none":
        for c in classes:
            scale = mp.mpf(0) if call.skip_absent and not size[c] else w[c]
            share, above, below = both[c] + nr, apart[c] + more, both[c] + apart[c] + dr
            values.append(scale * above / below if below else mp.mpf(0))
            derive(c, share, above, below, scale)
        return values, (inside, outside)
    power = {"square": 2, "simple": 1, "uniform": 0}[call.weighting]
    known = {c: 1 / size[c] ** power for c in classes if size[c] or not power}
    most = max(known.values(), default=mp.mpf(0))
    scales = {c: known.get(c, most) * w[c] for c in classes}
    above = more + mp.fsum(scales[c] * apart[c] for c in classes)
    share = nr + mp.fsum(scales[c] * both[c] for c in classes)
    below = dr + mp.fsum(scales[c] * (both[c] + apart[c]) for c in classes)
    for c in classes:
        derive(c, share, above, below, scales[c])
    return [above / below if below else mp.mpf(0)], (inside, outside)
