"""The gradients of rows of logits, from what was gathered of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import exp_each_to, factor_of_raised


@triton.jit
def at_classes(tensor, strides, n, first, lane, c, INDEX: tl.constexpr):
    """Pointers to the classes `c` of the positions first + lane."""
    base = tensor + n * strides[0] + first * strides[2]
    return base + (lane.to(INDEX) * strides[2])[:, None] + (c.to(INDEX) * strides[1])[None, :]


@triton.jit
def soft_part(
    soft, c, classes, where, PROBABILITIES: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """(hard * q + soft) * w: b without its one-hot part; 0 beyond the classes."""
    target, weight, strides, hard, flat = soft
    n, first, lane, inside = where
    known = (c < classes)[None, :]
    if PROBABILITIES:
        at = at_classes(target, strides, n, first, lane, c, INDEX)
        q = tl.load(at, mask=inside[:, None] & known, other=0.0).to(COMPUTE)
        part = tl.where(known, hard * q + flat, 0.0)
    else:
        part = tl.where(known, flat, 0.0)
    if weight is not None:
        part = part * tl.load(weight + c, mask=c < classes, other=0.0)[None, :]
    return part


@triton.jit
def slope_of(
    t, is_own, part, slopes, counted, SOFT: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    origin, _, first, factor, g, own_slope = slopes
    slope = exp_each_to(t, origin[:, None], EXACT) * first[:, None] * factor[:, None]
    if SOFT:
        slope -= g[:, None] * part
        slope = tl.where(counted[:, None], slope, 0.0)  # a weight may be NaN
    return tl.where(is_own, own_slope[:, None], slope)


@triton.jit
def target_slope(t, part, c, weight, classes, origin, log_total, scale):
    """scale * -log p, times the weight; 0 for a masked class without probability."""
    slope = scale[:, None] * ((origin[:, None] - t) + log_total[:, None])
    slope = tl.where((part == 0.0) & (t == -float("inf")), 0.0, slope)
    if weight is not None:
        slope = slope * tl.load(weight + c, mask=c < classes, other=0.0)[None, :]
    return slope


@triton.jit
def write(
    grad, grad_target, strides, target_strides, t, is_own, part, c, known, weight, classes, where, slopes,
    log_total, hard, counted, CACHE: tl.constexpr, PROBABILITIES: tl.constexpr, SOFT: tl.constexpr,
    EXACT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The gradients by some classes."""
    n, first, lane, _ = where
    origin, greatest, _, _, g, _ = slopes
    if grad is not None:
        if PROBABILITIES:
            is_own = t == greatest[:, None]
        slope = slope_of(t, is_own, part, slopes, counted, SOFT, EXACT)
        at = at_classes(grad, strides, n, first, lane, c, INDEX)
        tl.store(at, slope.to(grad.dtype.element_ty), mask=known, cache_modifier=CACHE)
    if grad_target is not None:
        slope = target_slope(t, part, c, weight, classes, origin, log_total, g * hard)
        at = at_classes(grad_target, target_strides, n, first, lane, c, INDEX)
        tl.store(at, slope.to(grad_target.dtype.element_ty), mask=known, cache_modifier=CACHE)


@triton.jit
def write_blocks(
    x, grad, grad_target, x_strides, strides, target_strides, soft, classes, where, y, counted, slopes,
    log_total, PROBABILITIES: tl.constexpr, SOFT: tl.constexpr, EXACT: tl.constexpr,
    APART: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backwards: what was read last is still in the cache."""
    n, first, lane, inside = where
    _, weight, _, hard, _ = soft
    _, _, _, _, _, own_slope = slopes
    step = tl.arange(0, BLOCK)
    label = y.to(tl.int32)[:, None]
    blocks = tl.cdiv(classes, BLOCK)
    for back in range(blocks):
        c = (blocks - 1 - back) * BLOCK + step
        known = inside[:, None] & (c < classes)[None, :]
        at = at_classes(x, x_strides, n, first, lane, c, INDEX)
        read = known & counted[:, None]
        t = tl.load(at, mask=read, other=-float("inf"), eviction_policy="evict_first").to(COMPUTE)
        is_own = c[None, :] == label
        if APART:
            is_own = False
        part = 0.0
        if SOFT:
            part = soft_part(soft, c, classes, where, PROBABILITIES, COMPUTE, INDEX)
        write(
            grad, grad_target, strides, target_strides, t, is_own, part, c, known, weight, classes, where,
            slopes, log_total, hard, counted, ".cs", PROBABILITIES, SOFT, EXACT, INDEX,
        )  # fmt: skip
    if APART:
        tl.debug_barrier()
        at = grad + n * strides[0] + y * strides[1] + (first + lane) * strides[2]
        tl.store(at, own_slope.to(grad.dtype.element_ty), mask=counted)


@triton.jit
def slopes_of(
    g, sums, own, total, certain, down, own_weight, hard, soft, counted, PROBABILITIES: tl.constexpr
):  # fmt: skip
    """What the gradient of a row is made of."""
    _, origin, others, mass, _, _, rest = sums
    hard_weight = own_weight * hard
    first, factor = factor_of_raised(g * (hard_weight + mass) / (total * down))
    # p - 1 as minus the others' share: exact where p is near 1.
    own_slope = g * ((mass * own - hard_weight * others) / total - soft * own_weight)
    greatest = origin
    if PROBABILITIES:
        # B p - b of the largest class as (B - b) - B (1 - p), for the same reason.
        own_slope = g * (rest - mass * others / total)
        greatest = tl.where(certain, origin, float("nan"))
    factor = tl.where(counted, factor, 0.0)
    own_slope = tl.where(counted, own_slope, 0.0)
    return origin, greatest, first, factor, g, own_slope
