"""CTC with 50 digits: what `fusedloss verify` holds its paths against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ...core import reduce
from ...kinds.ctc import CtcCall
from .exact import Exact, Number, Results, log, mp, numbers, pack, rounding

FEW_PATHS = 1000


def sequences(call: CtcCall, tensors: Sequence[Any]) -> list[Exact]:
    """CTC of a batch: over all paths where these are few, else frame by frame."""
    log_probs, targets, *_ = tensors
    info = torch.finfo(reduce.wide(log_probs))
    frames, n, classes = log_probs.shape
    lengths = call.lengths(tensors)
    labels = targets.flatten().tolist()
    values, units, slopes, slope_units = [], [], {}, {}
    for k in range(n):
        x = numbers(log_probs[: lengths.inputs[k], k])
        begin = lengths.starts[k]
        y = labels[begin : begin + lengths.targets[k]]
        few = classes ** len(x) <= FEW_PATHS
        total, shares = (_paths if few else _states)(x, y, call.blank, classes)
        value = -log(total)
        unit = mp.fsum(
            s * rounding(a, info)
            for row, here in zip(x, shares, strict=True)
            for a, s in zip(row, here, strict=True)
            if s
        )
        if call.zero_infinity and value == mp.inf:
            value = mp.mpf(0)
        values.append(value)
        units.append(unit)
        for t in range(frames):
            for c in range(classes):
                share = shares[t][c] if t < len(x) else mp.mpf(0)
                slopes[t, k, c], slope_units[t, k, c] = -share, share * unit
    every = sorted(slopes)
    by_input = pack([slopes[at] for at in every], [slope_units[at] for at in every])
    return [pack(values, units), by_input.at(log_probs.shape)]


def _paths(
    x: list[Results], y: list[int], blank: int, classes: int
) -> tuple[Number, list[Results]]:
    """The sum of the probabilities of all paths that give y, and their shares by frame and class."""
    total, through = mp.mpf(0), [[mp.mpf(0)] * classes for _ in x]
    for path in itertools.product(range(classes), repeat=len(x)):
        joined = [c for c, _ in itertools.groupby(path)]
        if [c for c in joined if c != blank] == y:
            p = mp.exp(mp.fsum(row[c] for row, c in zip(x, path, strict=True)))
            total += p
            for here, c in zip(through, path, strict=True):
                here[c] += p
    return total, [[s / total if total else s for s in here] for here in through]


def _states(
    x: list[Results], y: list[int], blank: int, classes: int
) -> tuple[Number, list[Results]]:
    """The same by sums over what leads to a state and what follows it."""
    states = [blank]
    for label in y:
        states += [label, blank]
    count = len(states)

    def next_of(s: int) -> list[int]:
        leaps = s % 2 and s + 2 < count and states[s + 2] != states[s]
        return [k for k in (s, s + 1, *((s + 2,) if leaps else ())) if k < count]

    zero, one = mp.mpf(0), mp.mpf(1)
    p = [[mp.exp(row[c]) if row[c] != -mp.inf else zero for c in states] for row in x]
    until = [[one] + [zero] * (count - 1)]
    for here in p:
        new = [zero] * count
        for s, share in enumerate(until[-1]):
            for k in next_of(s):
                new[k] += share * here[k]
        until.append(new)
    total = mp.fsum(until[-1][-2:])
    after = [zero] * max(count - 2, 0) + [one] * min(count, 2)
    shares: list[Results] = []
    for t in range(len(x) - 1, -1, -1):
        row = [zero] * classes
        for s, c in enumerate(states):
            row[c] += until[t + 1][s] * after[s] / total if total else zero
        shares.insert(0, row)
        after = [mp.fsum(after[k] * p[t][k] for k in next_of(s)) for s in range(count)]
    return total, shares
