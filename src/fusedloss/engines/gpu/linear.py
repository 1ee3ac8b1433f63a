"""The row step of linear losses through Triton, with class indices: the sums are those of `csrc/linear.h`.

One pass over a row of a chunk of logits gathers, another writes the gradient in their place. A row is
read whole before it is written to, or, where it does not fit, block by block, by the threads that then
write the block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kinds.heads import LinearCall, Rows, Slot
from . import flags, m
from .labels import OutOfRange, labels
from .launch import ceil_div, launch, reporting
from .pointwise import TRITON
from .softmax import exp_each_to, exp_to, factor_of_raised, gather, grouped, joined
from .tiles import groups, tile


def step(
    call: LinearCall,
    logits: Tensor,
    target: Tensor,
    weight: Slot,
    results: Rows,
    incoming: Rows | None,
    position: int,
    shape: torch.Size,
) -> None:
    """Fills `results` from a chunk (n, C) of logits; with `incoming` it becomes its gradient.

    `target` is a part of one head of a whole of `shape` (N, K); errors name its place there, and it
    begins at `position`.
    """
    n, classes = logits.shape
    if not n:
        return
    device = logits.device
    flags.raise_pending(device)
    arriving = incoming or Rows(None, None, None)  # type: ignore[arg-type]
    entropy = results.entropy is not None or arriving.entropy is not None
    compute = results.loss.dtype
    plain = logits.element_size() == 2 and not (call.softcap or call.smoothing or entropy)
    each = tile(classes, None, 1 if plain else 2, compute.itemsize, logits.element_size())
    unsigned = target.dtype is torch.uint64
    heads = shape[1]
    named = shape if heads > 1 else shape[:1]
    record = OutOfRange(call.loss, named, classes, call.ignore_index, unsigned)
    launch(
        _linear_rows,
        ceil_div(n, each.rows),
        device,
        logits=logits,
        target=target,
        weight=weight,
        **{name: dense(t) for name, t in results._asdict().items()},
        incoming=dense(arriving.loss),
        incoming_lse=dense(arriving.lse),
        incoming_entropy=dense(arriving.entropy),
        rows=n,
        classes=classes,
        row=logits.stride(0),
        target_stride=target.stride(0),
        position=position,
        step=heads,
        ignore_index=call.ignore_index,
        hard=1.0 - call.smoothing,
        soft=call.smoothing / classes,
        z_loss=call.z_loss,
        factor=call.logit_scale / (call.softcap or 1.0),
        scale=call.logit_scale,
        cap=call.softcap,
        **reporting(device, record),
        SMOOTH=call.smoothing > 0,
        CAP=call.softcap > 0,
        ENTROPY=entropy,
        SINGLE=each.single,
        COMPUTE=TRITON[compute],
        ROWS=each.rows,
        BLOCK=each.block,
        GROUPS=groups(each, logits, True),
        num_warps=each.warps,
    )
    flags.raise_if_eager(device)


def dense(tensor: Any) -> Any:
    """A number for each row, side by side."""
    assert tensor is None or tensor.shape[0] < 2 or tensor.stride(0) == 1
    return tensor


@triton.jit
def _logits(at, known, factor, cap, CAP: tl.constexpr, COMPUTE: tl.constexpr):
    return _bent(tl.load(at, mask=known, other=0.0).to(COMPUTE), known, factor, cap, CAP)


@triton.jit
def _bent(x, known, factor, cap, CAP: tl.constexpr):
    """softcap tanh(logit_scale x / softcap), and -inf beyond the classes."""
    x = x * factor
    if CAP:
        x = m.tanh(x) * cap
    return tl.where(known, x, -float("inf"))


@triton.jit
def _smooth(weight, c, classes, soft, SMOOTH: tl.constexpr):
    """The part of b that all classes have; 0 beyond the classes."""
    part = 0.0
    if SMOOTH:
        part = tl.where(c < classes, soft, 0.0)
        if weight is not None:
            part = part * tl.load(weight + c, mask=c < classes, other=0.0)
        part = part[None, :]
    return part


@triton.jit
def _product(t, origin, EXACT: tl.constexpr):
    """exp(t - origin) (t - origin), raised, 0 where the first is."""
    away = t - tl.expand_dims(origin, len(t.shape) - 1)
    e = exp_each_to(t, tl.expand_dims(origin, len(t.shape) - 1), EXACT)
    return tl.where(e == 0.0, 0.0, e * away)


@triton.jit
def _add(
    t, is_own, part, top, origin, others, mass, dot, products,
    SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds classes to the sums of `softmax.gather`, and to the others' exp(t - origin) (t - origin)."""
    new_top, new, new_others, mass, dot = gather(
        t, is_own, part, top, origin, others, mass, dot, SMOOTH, EXACT
    )
    if ENTROPY:
        shrink = tl.where(top == -float("inf"), 0.0, exp_to(origin, new, EXACT))
        moved = shrink * (products + (origin - new) * others) * m.lowered(t)
        moved = tl.where(shrink > 0.0, moved, 0.0)
        AXIS: tl.constexpr = len(t.shape) - 1
        products = moved + tl.sum(tl.where(is_own, 0.0, _product(t, new, EXACT)), AXIS)
    return new_top, new, new_others, mass, dot, products


@triton.jit
def _slope(
    t, is_own, part, origin, first, even, tilted, g, own_slope, counted, inverse_cap,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, TILTED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    slope = exp_each_to(t, origin[:, None], EXACT) * first[:, None] * even[:, None]
    if TILTED:
        slope += tilted[:, None] * (_product(t, origin, EXACT) * m.lowered(t))
    if SMOOTH:
        slope -= g[:, None] * part
    slope = tl.where(is_own, own_slope[:, None], slope)
    if CAP:
        u = t * inverse_cap
        slope *= (1.0 - u) * (1.0 + u)
    return tl.where(counted[:, None], slope, 0.0)


@triton.jit
def _value(of_rows, i, inside, absent, COMPUTE: tl.constexpr):
    value = tl.full(i.shape, absent, COMPUTE)
    if of_rows is not None:
        value = tl.load(of_rows + i, mask=inside, other=0.0)
    return value


@triton.jit
def _keep(of_rows, i, value, counted, bad, inside):
    if of_rows is not None:
        value = tl.where(bad, float("nan"), tl.where(counted, value, 0.0))
        tl.store(of_rows + i, value, mask=inside)


@triton.jit
def _gather_blocks(
    start_of, bend, smooth, classes, label, inside, sums, CAP: tl.constexpr, SMOOTH: tl.constexpr,
    ENTROPY: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The sums of rows that come in blocks: one is on its way while the one before is summed."""
    top, origin, others, mass, dot, products = sums
    by, most = bend
    weight, soft = smooth
    lane = tl.arange(0, BLOCK)
    known = inside[:, None] & (lane < classes)[None, :]
    coming = tl.load(start_of + lane[None, :], mask=known, other=0.0, eviction_policy="evict_last")
    for start in range(0, classes, BLOCK):
        c = start + lane
        t = _bent(coming.to(COMPUTE), inside[:, None] & (c < classes)[None, :], by, most, CAP)
        known = inside[:, None] & (c + BLOCK < classes)[None, :]
        at = start_of + (c + BLOCK)[None, :]
        coming = tl.load(at, mask=known, other=0.0, eviction_policy="evict_last")
        part = _smooth(weight, c, classes, soft, SMOOTH)
        if SMOOTH:
            part = grouped(tl.broadcast_to(part, t.shape), ROWS, GROUPS)
        top, origin, others, mass, dot, products = _add(
            grouped(t, ROWS, GROUPS), grouped(c[None, :] == label, ROWS, GROUPS), part, top,
            origin, others, mass, dot, products, SMOOTH, ENTROPY, EXACT,
        )  # fmt: skip
    if GROUPS > 1:
        if ENTROPY:
            best = tl.max(top, 1)[:, None]
            new = tl.where(best == -float("inf"), 0.0, best)
            shrink = tl.where(top == -float("inf"), 0.0, exp_to(origin, new, EXACT))
            moved = shrink * (products + (origin - new) * others) * m.lowered(others)
            products = tl.sum(tl.where(shrink > 0.0, moved, 0.0), 1)
        else:
            products = tl.sum(products, 1)
        top, origin, others, mass, dot = joined(top, origin, others, mass, dot, EXACT)
    return top, origin, others, mass, dot, products


@triton.jit
def _results(sums, own_x, hard_weight, z, counted, SMOOTH: tl.constexpr, EXACT: tl.constexpr):
    """Of each row: the loss, log sum and entropy; and what the gradient takes of them."""
    _, origin, others, mass, dot, products = sums
    own = tl.where(counted, exp_to(own_x, origin, EXACT), 0.0)
    total = others + own
    # Where the own class is the largest, log1p keeps the digits that 1 + others loses.
    certain = counted & (own_x == origin) & (tl.abs(own_x) < float("inf"))
    down = m.lowered(total)
    log_total = tl.where(certain, m.log1p(others * down), m.log(total * down))
    log_sum = origin + log_total
    value = hard_weight * (log_total + tl.where(certain, 0.0, origin - own_x))
    if SMOOTH:
        value += mass * log_total - dot
    value += tl.where(z == 0.0, 0.0, z * log_sum * log_sum)
    bend = tl.where(own > 0.0, own * (own_x - origin), 0.0)
    mean_x = (products + bend) / total
    return value, log_sum, log_total, own, total, down, bend, mean_x


@triton.jit
def _slopes(
    sums, results, incoming, own_weight, hard_weight, soft, z, scale, i, inside,
    ENTROPY: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient is p (even + tilted (x' - max)) - g b."""
    arriving, arriving_lse, arriving_entropy = incoming
    _, origin, others, mass, _, _ = sums
    _, log_sum, _, own, total, down, bend, mean_x = results
    scaled = tl.full((), scale, COMPUTE)
    g = scaled * _value(arriving, i, inside, 1.0, COMPUTE)
    tilted = -scaled * _value(arriving_entropy, i, inside, 0.0, COMPUTE)
    pull = g * (mass + tl.where(z == 0.0, 0.0, 2.0 * z * log_sum))
    pull += scaled * _value(arriving_lse, i, inside, 0.0, COMPUTE)
    if ENTROPY:
        pull -= tilted * mean_x
    first, even = factor_of_raised((g * hard_weight + pull) / (total * down))
    # p - 1 as minus the others' share: exact where p is near 1.
    own_slope = (pull * own + tilted * bend - g * hard_weight * others) / total
    own_slope -= g * soft * own_weight
    return origin, first, even, tilted / (total * down), g, own_slope


@triton.jit
def _write_blocks(
    start_of, bend, smooth, classes, label, inside, counted, slopes, CAP: tl.constexpr,
    SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Backwards: what was read last is still in the cache."""
    by, most = bend
    weight, soft = smooth
    origin, first, even, tilted, g, own_slope = slopes
    lane, inverse_cap = tl.arange(0, BLOCK), 1.0 / most
    blocks = tl.cdiv(classes, BLOCK)
    for back in range(blocks):
        c = (blocks - 1 - back) * BLOCK + lane
        known = inside[:, None] & (c < classes)[None, :]
        at = start_of + c[None, :]
        t = _logits(at, known, by, most, CAP, COMPUTE)
        slope = _slope(
            t, c[None, :] == label, _smooth(weight, c, classes, soft, SMOOTH), origin, first, even, tilted,
            g, own_slope, counted, inverse_cap, SMOOTH, CAP, ENTROPY, EXACT,
        )  # fmt: skip
        tl.store(at, slope.to(start_of.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["record", "ignore_index", "position"])
def _linear_rows(
    logits, target, weight, loss, lse, entropy, correct, incoming, incoming_lse, incoming_entropy,
    rows, classes, row, target_stride, position, step, ignore_index,
    hard: tl.float64, soft: tl.float64, z_loss: tl.float64,
    factor: tl.float64, scale: tl.float64, cap: tl.float64, claim, words, record,
    SMOOTH: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr, SINGLE: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth >= 32
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < rows
    by, most = tl.full((), factor, COMPUTE), tl.full((), cap, COMPUTE)
    soft_part = tl.full((), soft, COMPUTE)
    y, bad = labels(
        target, (0, target_stride), 0, i, position + i * step, inside, classes, ignore_index,
        claim, words, record,
    )  # fmt: skip
    counted = y >= 0
    own_weight = counted.to(COMPUTE)
    if weight is not None:
        own_weight = tl.load(weight + y, mask=counted, other=0.0)
    own_x = _logits(logits + i * row + y, counted, by, most, CAP, COMPUTE)
    # What the pass over the classes gathers, relative to the greatest logit so far, of rows or of their groups:
    # what crosses threads waits for the end.
    SHAPE: tl.constexpr = (ROWS, GROUPS) if GROUPS > 1 else (ROWS,)
    zero = tl.zeros(SHAPE, COMPUTE)
    sums = (tl.full(SHAPE, -float("inf"), COMPUTE), zero, zero, zero, zero, zero)
    label = y.to(tl.int32)[:, None]
    start_of = logits + (i * row)[:, None]
    if SINGLE:
        lane = tl.arange(0, BLOCK)
        known = inside[:, None] & (lane < classes)[None, :]
        is_own = lane[None, :] == label
        t = _logits(start_of + lane[None, :], known, by, most, CAP, COMPUTE)
        part = _smooth(weight, lane, classes, soft_part, SMOOTH)
        sums = _add(
            t, is_own, part, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], SMOOTH, ENTROPY, EXACT
        )  # fmt: skip
    else:
        sums = _gather_blocks(
            start_of, (by, most), (weight, soft_part), classes, label, inside, sums, CAP, SMOOTH,
            ENTROPY, EXACT, COMPUTE, ROWS, BLOCK, GROUPS,
        )  # fmt: skip
    hard_weight = own_weight * tl.full((), hard, COMPUTE)
    z = tl.full((), z_loss, COMPUTE)
    results = _results(sums, own_x, hard_weight, z, counted, SMOOTH, EXACT)
    _keep(loss, i, results[0], counted, bad, inside)
    _keep(lse, i, results[1], counted, bad, inside)
    _keep(entropy, i, results[2] - results[7], counted, bad, inside)
    _keep(correct, i, (own_x == sums[0]).to(COMPUTE), counted, bad, inside)
    if incoming is not None:
        slopes = _slopes(
            sums, results, (incoming, incoming_lse, incoming_entropy), own_weight, hard_weight, soft_part, z,
            scale, i, inside, ENTROPY, COMPUTE,
        )  # fmt: skip
        if SINGLE:
            slope = _slope(
                t, is_own, part, slopes[0], slopes[1], slopes[2], slopes[3], slopes[4], slopes[5], counted,
                1.0 / most, SMOOTH, CAP, ENTROPY, EXACT,
            )  # fmt: skip
            slope = slope.to(logits.dtype.element_ty)
            tl.store(start_of + lane[None, :], slope, mask=known)
        else:
            _write_blocks(
                start_of, (by, most), (weight, soft_part), classes, label, inside, counted, slopes,
                CAP, SMOOTH, ENTROPY, EXACT, COMPUTE, BLOCK,
            )  # fmt: skip
