"""The losses of overlaps from the sums of their classes, through Triton; in float64: see csrc/overlap.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def settled(sums, count, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up what programs left, in order, in the place of the first."""
    lane, step = tl.arange(0, WIDE).to(tl.int64), tl.arange(0, BLOCK)
    for start in range(0, columns, BLOCK):
        c = start + step
        total = tl.zeros((WIDE, BLOCK), tl.float64)
        for first in range(0, count, WIDE):
            row = first + lane
            at = sums + (row * columns)[:, None] + c[None, :]
            there = (row < count)[:, None] & (c < columns)[None, :]
            total += tl.load(at, mask=there, other=0.0)
        # Nobody reads these columns any more, but all must have before they are written to.
        tl.debug_barrier()
        tl.store(sums + c, tl.sum(total, 0), mask=c < columns)
    tl.debug_barrier()


@triton.jit
def _of_classes(sums, weight, c, classes, first):
    """What is summed of some classes, 0 of those that do not count, which do, and what each weighs."""
    counts = (c >= first) & (c < classes)
    both = tl.load(sums + c, mask=counts, other=0.0)
    wrong = tl.load(sums + classes + c, mask=counts, other=0.0)
    missed = tl.load(sums + 2 * classes + c, mask=counts, other=0.0)
    own = tl.where(counts, 1.0, 0.0).to(tl.float64)
    if weight is not None:
        own = tl.load(weight + c, mask=counts, other=0.0).to(tl.float64)
    return both, wrong, missed, counts, own


@triton.jit
def _share_of_size(sums, c, classes, counts, WEIGHTING: tl.constexpr):
    """What a class weighs in one overlap of all, by its size; infinite without one."""
    size = tl.load(sums + 3 * classes + c, mask=counts, other=0.0)
    if WEIGHTING == 1:
        found = 1.0 / (size * size)
    elif WEIGHTING == 2:
        found = 1.0 / size
    else:
        found = tl.full(size.shape, 1.0, tl.float64)
    return tl.where(counts, found, 0.0)


@triton.jit
def _store_slopes(slopes, c, classes, share, above, below, scale, alpha, beta):
    """What p is multiplied by in the gradient where the target is 1, and where it is 0."""
    empty = (below == 0.0) | (scale == 0.0)
    below = tl.where(empty, 1.0, below)
    by_both, by_apart = -above / below / below, share / below / below
    inside = tl.where(empty, 0.0, scale * (by_both - beta * by_apart))
    outside = tl.where(empty, 0.0, scale * alpha * by_apart)
    tl.store(slopes + c, inside, mask=c < classes)
    tl.store(slopes + classes + c, outside, mask=c < classes)


@triton.jit
def _arrived(incoming, strides, group, k, there):
    found = tl.full(k.shape, 1.0, tl.float64)
    if incoming is not None:
        at = incoming + group * strides[0] + k * strides[1]
        found = tl.load(at, mask=there, other=0.0).to(tl.float64)
    return found


@triton.jit
def _each(
    sums, slopes, loss, weight, incoming, loss_strides, incoming_strides, group, settings, spoilt, classes,
    first, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each class by itself."""
    alpha, beta, smooth_nr, smooth_dr, scale = settings
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        both, wrong, missed, counts, own = _of_classes(sums, weight, c, classes, first)
        apart = alpha * wrong + beta * missed
        above, below = apart + (smooth_dr - smooth_nr), both + apart + smooth_dr
        if SKIP:
            own = tl.where(both + missed == 0.0, 0.0, own)
        empty = (below == 0.0) | (own == 0.0)
        value = tl.where(empty, 0.0, own * (above / tl.where(empty, 1.0, below)))
        value = tl.where(spoilt, float("nan"), value)
        if loss is not None:
            at = loss + group * loss_strides[0] + (c - first) * loss_strides[1]
            tl.store(at, value.to(loss.dtype.element_ty), mask=counts)
        total += tl.where(counts, scale * value, 0.0)
        if slopes is not None:
            arrived = _arrived(incoming, incoming_strides, group, c - first, counts)
            by = scale * own * arrived
            _store_slopes(slopes, c, classes, both + smooth_nr, above, below, by, alpha, beta)
    return tl.sum(total)


@triton.jit
def _together(
    sums, slopes, loss, weight, incoming, loss_strides, incoming_strides, group, settings, spoilt, classes,
    first, WEIGHTING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One fraction of all classes; one without a mask weighs as much as the most that another does."""
    alpha, beta, smooth_nr, smooth_dr, scale = settings
    most = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        each = _share_of_size(sums, c, classes, (c >= first) & (c < classes), WEIGHTING)
        most = tl.maximum(most, tl.where(each == float("inf"), 0.0, each))
    greatest = tl.max(most, 0)
    all_both, all_apart = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        both, wrong, missed, counts, own = _of_classes(sums, weight, c, classes, first)
        each = _share_of_size(sums, c, classes, counts, WEIGHTING)
        own = tl.where(each == float("inf"), greatest, each) * own
        all_both += own * both
        all_apart += own * (alpha * wrong + beta * missed)
    both, apart = tl.sum(all_both), tl.sum(all_apart)
    above, below = apart + (smooth_dr - smooth_nr), both + apart + smooth_dr
    value = tl.where(below == 0.0, 0.0, above / tl.where(below == 0.0, 1.0, below))
    value = tl.where(spoilt, float("nan"), value)
    if loss is not None:
        tl.store(loss + group * loss_strides[0], value.to(loss.dtype.element_ty))
    if slopes is not None:
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            _, wrong, missed, counts, own = _of_classes(sums, weight, c, classes, first)
            each = _share_of_size(sums, c, classes, counts, WEIGHTING)
            own = tl.where(each == float("inf"), greatest, each) * own
            arrived = _arrived(incoming, incoming_strides, group, c * 0, counts)
            by = scale * own * arrived
            whole = tl.zeros((BLOCK,), tl.float64) + below
            _store_slopes(slopes, c, classes, both + smooth_nr, above, whole, by, alpha, beta)
    return scale * value


@triton.jit
def overlap(
    sums, slopes, loss, weight, incoming, loss_strides, incoming_strides, group, settings, spoilt, classes,
    first, WEIGHTING: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The losses of a group, whose sum this gives, and what its gradient is made of."""
    if WEIGHTING == 0:
        total = _each(
            sums, slopes, loss, weight, incoming, loss_strides, incoming_strides, group, settings, spoilt,
            classes, first, SKIP, BLOCK,
        )  # fmt: skip
    else:
        total = _together(
            sums, slopes, loss, weight, incoming, loss_strides, incoming_strides, group, settings, spoilt,
            classes, first, WEIGHTING, BLOCK,
        )  # fmt: skip
    return total
