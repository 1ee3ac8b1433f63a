"""The focal loss with label smoothing, in which every class of a row has a part: see csrc/positions.h."""

from __future__ import annotations

import triton
import triton.language as tl

from . import m
from .cross_entropy import arrived_at, own_class, reduce_rows
from .focal import powers
from .gradients_of_rows import at_classes
from .softmax import add_classes, no_classes, shares, total_of


@triton.jit
def _logits(
    x, strides, where, c, counted, classes, COMPUTE: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    n, first, lane, inside = where
    known = inside[:, None] & (c < classes)[None, :]
    at = at_classes(x, strides, n, first, lane, c, INDEX)
    return tl.load(at, mask=known & counted[:, None], other=-float("inf")).to(COMPUTE), known


@triton.jit
def _parts(
    t, y, c, known, weight, sums, log_total, hard, soft, gamma, classes, EXACT: tl.constexpr
):
    """Of some classes: p, 1 - p, the share of the loss, and what takes the place of b in the gradient."""
    _, origin, _, _, _, _ = sums
    p, rest = shares(t, sums, EXACT)
    flat = tl.full((), soft, tl.float64)
    own = tl.full((), hard, tl.float64) + flat
    b = tl.where(c[None, :] == y.to(tl.int32)[:, None], own, flat)
    if weight is not None:
        b = b * tl.load(weight + c, mask=c < classes, other=0.0).to(tl.float64)[None, :]
    surprise = log_total[:, None].to(tl.float64) + (origin[:, None] - t).to(tl.float64)
    power, slope = powers(p.to(tl.float64), rest.to(tl.float64), surprise, gamma)
    value = tl.where((b == 0.0) & (t == t), 0.0, b * power * surprise)
    return p, rest, tl.where(known, value, 0.0), tl.where(known, b * slope, 0.0)


@triton.jit(do_not_specialize=["record", "ignore_index"])
def focal_rows(
    x, target, weight, incoming, loss, grad, grad_target, partial, result, divisor,
    classes, across, positions,
    x_strides, target_strides, incoming_strides, loss_strides, grad_strides, grad_target_strides,
    ignore_index, hard: tl.float64, soft: tl.float64, gamma: tl.float64, denominator: tl.float64,
    claim, words, record,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, FOCAL: tl.constexpr, WEIGHTS_MEAN: tl.constexpr,
    SINGLE: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x.dtype.element_ty.primitive_bitwidth >= 32
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    program = tl.program_id(0).to(tl.int64)
    n, first, lane = program // across, program % across * ROWS, tl.arange(0, ROWS)
    d = first + lane
    inside = d < positions
    where = (n, first, lane, inside)
    arrived = arrived_at(incoming, incoming_strides, n, d, inside, COMPUTE)
    y, bad, counted, own_weight, _own_x = own_class(
        x, x_strides, weight, target, target_strides, (n, d, n * positions + d, inside), classes,
        ignore_index, (claim, words, record), COMPUTE,
    )  # fmt: skip
    sums = no_classes(ROWS, COMPUTE)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        t, known = _logits(x, x_strides, where, c, counted, classes, COMPUTE, INDEX)
        sums = add_classes(t, 0.0, sums, EXACT, False)
    top, own, others = sums[0], sums[2], sums[3]
    # Where one class is the greatest, log1p keeps the digits that 1 + others loses.
    alone, down = own == m.raised(own), m.lowered(own)
    log_total = tl.where(alone, m.log1p(others * down), m.log(total_of(sums) * down))
    value, mass = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    of_others = tl.zeros((ROWS,), tl.float64)
    for start in range(0, classes, BLOCK):
        c = start + tl.arange(0, BLOCK)
        t, known = _logits(x, x_strides, where, c, counted, classes, COMPUTE, INDEX)
        p, rest, share, slope = _parts(
            t, y, c, known, weight, sums, log_total, hard, soft, gamma, classes, EXACT
        )
        value += tl.sum(share, 1)
        mass += tl.sum(slope, 1)
        of_others += tl.sum(tl.where(t == top[:, None], 0.0, slope), 1)
    value = tl.where(bad, float("nan"), tl.where(counted, value, 0.0))
    place = n * loss_strides[0] + d * loss_strides[1]
    by = reduce_rows(
        value, loss, partial, result, divisor, own_weight, denominator, place, inside, WEIGHTS_MEAN
    )
    if grad is not None:
        scale = tl.where(counted, arrived.to(tl.float64) / by, 0.0)
        for start in range(0, classes, BLOCK):
            c = start + tl.arange(0, BLOCK)
            t, known = _logits(x, x_strides, where, c, counted, classes, COMPUTE, INDEX)
            p, rest, share, slope = _parts(
                t, y, c, known, weight, sums, log_total, hard, soft, gamma, classes, EXACT
            )
            # B p - b of the greatest class as (B - b) - B (1 - p): exact where p is near 1.
            is_greatest = (t == top[:, None]) & alone[:, None]
            g = tl.where(
                is_greatest,
                of_others[:, None] - mass[:, None] * rest.to(tl.float64),
                mass[:, None] * p.to(tl.float64) - slope,
            )
            g = tl.where(counted[:, None], g * scale[:, None], 0.0)
            at = at_classes(grad, grad_strides, n, first, lane, c, INDEX)
            tl.store(at, g.to(COMPUTE).to(grad.dtype.element_ty), mask=known)
