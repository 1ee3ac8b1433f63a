"""The passes of an overlap over the places of images, through Triton: see csrc/dice.h.

`images` are the tensors as (n, c, d), `where` the places of a tile, `span` the tiles of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import m
from .cross_entropy import own_class, value_of
from .focal import focused
from .gradients_of_rows import at_classes
from .softmax import add_classes, all_but, inverse, no_classes, shares, total_of


@triton.jit
def _places(u, group, across, positions, BATCH: tl.constexpr, ROWS: tl.constexpr):
    """The image and the places of a tile, and which of these there are."""
    n = group
    if BATCH:
        n = u // across
    first, lane = u % across * ROWS, tl.arange(0, ROWS)
    return n, first, lane, first + lane < positions


@triton.jit
def _scores(
    images, where, c, counted, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr
):
    """What the input holds of some classes; and which there are."""
    x, _, _, strides, _, _, classes, _ = images
    n, first, lane, inside = where
    known = inside[:, None] & (c < classes)[None, :]
    read = known & counted[:, None]  # of a place that does not count nothing: it may hold NaN
    at = at_classes(x, strides, n, first, lane, c, INDEX)
    if ACTIVATION == 0:
        t = tl.load(at, mask=read, other=-float("inf"))
    else:
        t = tl.load(at, mask=read, other=0.0)
    return t.to(COMPUTE), known


@triton.jit
def _probabilities(t, sums, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """p and 1 - p."""
    if ACTIVATION == 0:
        p, rest = shares(t, sums, EXACT)
    elif ACTIVATION == 1:
        p, rest = m.sigmoid(t), m.sigmoid(-t)
    else:
        p, rest = t, 1.0 - t
    return p, rest


@triton.jit
def _masks(
    images, where, c, y, counted, known, MASKS: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """The masks of some classes, or which are the own ones; and what counts."""
    _, target, _, _, strides, _, _, ignore_index = images
    n, first, lane, _ = where
    if MASKS:
        at = at_classes(target, strides, n, first, lane, c, INDEX)
        given = tl.load(at, mask=known, other=0)
        mask = given.to(COMPUTE)
        if given.dtype.is_floating():
            counts = known & (mask != ignore_index.to(COMPUTE))
        else:
            counts = known & (given.to(tl.int64) != ignore_index)
        mask = tl.where(counts, mask, 0.0)
    else:
        mask = c[None, :] == y.to(tl.int32)[:, None]
        counts = known & counted[:, None]
    return mask, counts


@triton.jit
def _labels(
    images, where, told, MASKS: tl.constexpr, ROWS_TOO: tl.constexpr, COMPUTE: tl.constexpr
):
    """The class of each place, -1 where it does not count; which are wrong, their weights and logits."""
    x, target, weight, x_strides, strides, positions, classes, ignore_index = images
    n, first, lane, inside = where
    y, bad, counted = tl.full(lane.shape, -1, tl.int64), inside & False, inside
    own_weight, own_x = tl.zeros(lane.shape, COMPUTE), tl.zeros(lane.shape, COMPUTE)
    if not MASKS:
        d = first + lane
        y, bad, counted, own_weight, own_x = own_class(
            x, x_strides, weight if ROWS_TOO else None, target, strides,
            (n, d, n * positions + d, inside), classes, ignore_index, told, COMPUTE,
        )  # fmt: skip
    return y, bad, counted, own_weight, own_x


@triton.jit
def _rows(
    sums, y, own_x, own_weight, counted, bad, gamma, FOCAL: tl.constexpr, EXACT: tl.constexpr
):
    """Cross entropy or the focal loss of each place, and what the gradient multiplies p - q by."""
    _, origin, _, _, _, _ = sums
    gathered = (0.0, origin, all_but(own_x, sums, EXACT), 0.0, 0.0, 0.0, 0.0)
    value, own, total, certain, _, log_total = value_of(
        gathered, y, own_x, own_weight, counted, bad, False, False, EXACT
    )
    seen = own_weight
    if FOCAL:
        value, seen = focused(
            value, gathered, own, total, certain, own_x, log_total, gamma, own_weight, counted
        )
    return value, seen


@triton.jit
def _gather(
    images, where, y, counted, slopes, arrived, VALUES: tl.constexpr, MASKS: tl.constexpr,
    EXACT: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is summed of the classes of each place; with their slopes, too."""
    classes = images[6]
    sums = no_classes(ROWS, COMPUTE)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        t, known = _scores(images, where, c, counted, 0, COMPUTE, INDEX)
        v = 0.0
        if VALUES:
            mask, counts = _masks(images, where, c, y, counted, known, MASKS, COMPUTE, INDEX)
            v = _slopes(slopes, c, classes, arrived, mask, counts, MASKS)
        sums = add_classes(t, v, sums, EXACT, VALUES)
    return sums


@triton.jit
def _add(sums, term, counts, there, before):
    total = tl.sum(tl.where(counts, term, 0.0), 0).to(tl.float64)
    total += tl.load(sums, mask=before, other=0.0)
    tl.store(sums, total, mask=there)


@triton.jit
def add_sums(
    images, span, sums, gamma, told, ACTIVATION: tl.constexpr, MASKS: tl.constexpr, BATCH: tl.constexpr,
    SIZES: tl.constexpr, ROWS_TOO: tl.constexpr, FOCAL: tl.constexpr, EXACT: tl.constexpr,
    COMPUTE: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of p t, p (1 - t), (1 - p) t and t of each class; gives that of the rows, NaN of a wrong label."""
    positions, classes = images[5], images[6]
    group, across, begin, end = span
    of_rows = tl.full((), 0.0, tl.float64)
    for k in range(end - begin):
        where = _places(begin + k, group, across, positions, BATCH, ROWS)
        y, bad, counted, own_weight, own_x = _labels(images, where, told, MASKS, ROWS_TOO, COMPUTE)
        found = no_classes(ROWS, COMPUTE)
        if ACTIVATION == 0:
            found = _gather(
                images,
                where,
                y,
                counted,
                None,
                1.0,
                False,
                MASKS,
                EXACT,
                COMPUTE,
                INDEX,
                ROWS,
                BLOCK,
            )
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            t, known = _scores(images, where, c, counted, ACTIVATION, COMPUTE, INDEX)
            p, rest = _probabilities(t, found, ACTIVATION, EXACT)
            mask, counts = _masks(images, where, c, y, counted, known, MASKS, COMPUTE, INDEX)
            if MASKS:
                both, wrong, missed = p * mask, p * (1.0 - mask), rest * mask
            else:  # a class that is elsewhere does not know of what its places hold
                both, wrong = tl.where(mask, p, 0.0), tl.where(mask, 0.0, p)
                missed = tl.where(mask, rest, 0.0)
            there = c < classes
            before = there & (k > 0)
            _add(sums + c, both, counts, there, before)
            _add(sums + classes + c, wrong, counts, there, before)
            _add(sums + 2 * classes + c, missed, counts, there, before)
            if SIZES:
                _add(sums + 3 * classes + c, mask.to(COMPUTE), counts, there, before)
        if ROWS_TOO:
            value, _seen = _rows(found, y, own_x, own_weight, counted, bad, gamma, FOCAL, EXACT)
            of_rows += tl.sum(value.to(tl.float64))
        elif not MASKS:
            of_rows += tl.where(tl.max(bad.to(tl.int32), 0) > 0, float("nan"), 0.0)
        tl.debug_barrier()
    return of_rows


@triton.jit
def _slopes(slopes, c, classes, arrived, mask, counts, MASKS: tl.constexpr):
    """What p is multiplied by in the gradient."""
    inside = (tl.load(slopes + c, mask=c < classes, other=0.0) * arrived)[None, :]
    outside = (tl.load(slopes + classes + c, mask=c < classes, other=0.0) * arrived)[None, :]
    if MASKS:
        t = mask.to(tl.float64)
        v = t * inside + (1.0 - t) * outside
    else:
        v = tl.where(mask, inside, outside)
    return tl.where(counts, v, 0.0)


@triton.jit
def gradient(
    images, span, slopes, grad, grad_strides, arrived, by_rows, gamma, ACTIVATION: tl.constexpr,
    MASKS: tl.constexpr, BATCH: tl.constexpr, ROWS_TOO: tl.constexpr, FOCAL: tl.constexpr,
    EXACT: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a softmax p (v - S), with v - S of the greatest class as the others' part of it, and so for all."""
    positions, classes = images[5], images[6]
    group, across, begin, end = span
    for k in range(end - begin):
        where = _places(begin + k, group, across, positions, BATCH, ROWS)
        n, first, lane, _inside = where
        y, bad, counted, own_weight, own_x = _labels(
            images, where, (None, None, 0), MASKS, ROWS_TOO, COMPUTE
        )
        found = no_classes(ROWS, COMPUTE)
        if ACTIVATION == 0:
            found = _gather(
                images,
                where,
                y,
                counted,
                slopes,
                arrived,
                True,
                MASKS,
                EXACT,
                COMPUTE,
                INDEX,
                ROWS,
                BLOCK,
            )
        own, others, of_greatest, of_others = found[2], found[3], found[4], found[5]
        greatest = of_greatest / (own * m.lowered(own)).to(tl.float64)
        beyond = (others * greatest.to(COMPUTE) - of_others) * inverse(total_of(found))
        by = tl.zeros((ROWS,), COMPUTE)
        if ROWS_TOO:
            _value, seen = _rows(found, y, own_x, own_weight, counted, bad, gamma, FOCAL, EXACT)
            by = (seen.to(tl.float64) * by_rows).to(COMPUTE)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            t, known = _scores(images, where, c, counted, ACTIVATION, COMPUTE, INDEX)
            p, rest = _probabilities(t, found, ACTIVATION, EXACT)
            mask, counts = _masks(images, where, c, y, counted, known, MASKS, COMPUTE, INDEX)
            v = _slopes(slopes, c, classes, arrived, mask, counts, MASKS)
            if ACTIVATION == 0:
                g = p * ((v - greatest[:, None]).to(COMPUTE) + beyond[:, None])
                if ROWS_TOO:
                    g += tl.where(mask, -rest, p) * by[:, None]
            elif ACTIVATION == 1:
                g = v.to(COMPUTE) * p * rest
            else:
                g = v.to(COMPUTE)
            g = tl.where(counted[:, None], g, 0.0)
            at = at_classes(grad, grad_strides, n, first, lane, c, INDEX)
            tl.store(at, g.to(grad.dtype.element_ty), mask=known)
