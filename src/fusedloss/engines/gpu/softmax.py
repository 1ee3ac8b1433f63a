"""Sums over the classes of a row, relative to its greatest logit."""

from __future__ import annotations

import triton
import triton.language as tl

from . import m


@triton.jit
def exp_to(x, origin, EXACT: tl.constexpr):
    """exp(x - origin), raised, where `origin` is the greatest x: exact for logits that have the digits."""
    return m.exp_raised(x - origin) if EXACT else m.exp_fast(x - origin)


@triton.jit
def exp_each_to(x, origin, EXACT: tl.constexpr):
    """The same of many x to one origin, where none needs to be exactly 1."""
    return m.exp_raised(x - origin) if EXACT else m.exp_difference(x, origin)


@triton.jit
def gather(
    t, is_own, part, top, origin, others, mass, dot, SOFT: tl.constexpr, EXACT: tl.constexpr
):
    """Adds classes, which lie along the last axis, to the sums, brought to the new greatest logit."""
    AXIS: tl.constexpr = len(t.shape) - 1
    new_top = tl.maximum(top, tl.max(t, AXIS))
    new = tl.where(new_top == -float("inf"), 0.0, new_top)
    shrink = tl.where(top == -float("inf"), 0.0, exp_to(origin, new, EXACT))
    e = exp_each_to(t, tl.expand_dims(new, AXIS), EXACT)
    others = others * shrink * m.lowered(t) + tl.sum(tl.where(is_own, 0.0, e), AXIS)
    if SOFT:
        # A class without probability does not count, not even where its logit is -inf.
        term = tl.where((part == 0.0) & (t == t), 0.0, part * (t - tl.expand_dims(new, AXIS)))
        dot += mass * (origin - new) + tl.sum(term, AXIS)
        mass += tl.sum(tl.broadcast_to(part, t.shape), AXIS)
    return new_top, new, others, mass, dot


@triton.jit
def grouped(t, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """(rows, classes) as (rows, groups, classes): a group is within a thread, and needs no other."""
    if GROUPS > 1:
        t = tl.reshape(t, (ROWS, GROUPS, t.shape[1] // GROUPS))
    return t


@triton.jit
def joined(top, origin, others, mass, dot, EXACT: tl.constexpr):
    """The sums of a row from those of its groups."""
    new_top = tl.max(top, 1)
    new = tl.where(new_top == -float("inf"), 0.0, new_top)
    shrink = tl.where(top == -float("inf"), 0.0, exp_to(origin, new[:, None], EXACT))
    dot = tl.sum(dot + mass * (origin - new[:, None]), 1)
    others = others * shrink * m.lowered(others)
    return new_top, new, tl.sum(others, 1), tl.sum(mass, 1), dot


@triton.jit
def gather_greatest(t, part, top, origin, others, mass, dot, own, rest, EXACT: tl.constexpr):
    """The same of probabilities, whose own class is that of the greatest logit: `own` is its exp.

    Several share it; `rest` is the mass of the others.
    """
    AXIS: tl.constexpr = len(t.shape) - 1
    new_top = tl.maximum(top, tl.max(t, AXIS))
    finite = tl.where(tl.abs(new_top) == float("inf"), float("nan"), new_top)
    is_greatest = t == tl.expand_dims(finite, AXIS)
    raised = new_top > top
    others = tl.where(raised, others + own, others)
    new_top, new, others, new_mass, dot = gather(
        t, is_greatest, part, top, origin, others, mass, dot, True, EXACT
    )
    own = tl.where(raised, 0.0, own) + tl.sum(is_greatest.to(t.dtype), AXIS) * m.raised(t)
    rest = tl.where(raised, mass, rest) + tl.sum(tl.where(is_greatest, 0.0, part), AXIS)
    return new_top, new, others, new_mass, dot, own, rest


@triton.jit
def joined_greatest(top, origin, others, mass, dot, own, rest, EXACT: tl.constexpr):
    """The same from those of groups: where a group's greatest is not the row's, it is one of the others."""
    is_greatest = top == tl.max(top, 1)[:, None]
    others += tl.where(is_greatest, 0.0, own)
    own = tl.sum(tl.where(is_greatest, own, 0.0), 1)
    rest = tl.sum(tl.where(is_greatest, rest, mass), 1)
    new_top, new, others, mass, dot = joined(top, origin, others, mass, dot, EXACT)
    return new_top, new, others, mass, dot, own, rest


@triton.jit
def factor_of_raised(scale):
    """What raised exps are multiplied by, twice, for `scale` times the exps: one alone may be too small."""
    small = tl.abs(scale) < 1e-20
    first = tl.where(small, m.lowered(scale), 1.0).to(scale.dtype)
    return first, tl.where(small, scale, scale * m.lowered(scale))


@triton.jit
def no_classes(ROWS: tl.constexpr, COMPUTE: tl.constexpr):
    """What `add_classes` gathers of rows: the greatest logit, its finite self, the raised exps of those
    as great, how often there is one, and the raised exps of all others; then of their values."""
    zero = tl.zeros((ROWS,), COMPUTE)
    many = tl.zeros((ROWS,), tl.float64)
    return tl.full((ROWS,), -float("inf"), COMPUTE), zero, zero, zero, many, zero


@triton.jit
def add_classes(t, value, sums, EXACT: tl.constexpr, VALUES: tl.constexpr):
    """Adds classes, and what each is weighed with."""
    top, origin, own, others, of_greatest, of_others = sums
    new_top = tl.maximum(top, tl.max(t, 1))
    new = tl.where(new_top == -float("inf"), 0.0, new_top)
    shrink = tl.where(top == -float("inf"), 0.0, exp_to(origin, new, EXACT)) * m.lowered(t)
    e = exp_each_to(t, new[:, None], EXACT)
    is_greatest = t == new_top[:, None]
    raised = new_top > top
    others = tl.where(raised, others + own, others) * shrink
    others += tl.sum(tl.where(is_greatest, 0.0, e), 1)
    own = tl.where(raised, 0.0, own) + tl.sum(is_greatest.to(t.dtype), 1) * m.raised(t)
    if VALUES:
        lost = of_greatest.to(t.dtype) * m.raised(t)
        of_others = tl.where(raised, of_others + lost, of_others) * shrink
        of_others += tl.sum(tl.where(is_greatest, 0.0, e * value.to(t.dtype)), 1)
        of_greatest = tl.where(raised, 0.0, of_greatest)
        of_greatest += tl.sum(tl.where(is_greatest, value, 0.0).to(tl.float64), 1)
    return new_top, new, own, others, of_greatest, of_others


@triton.jit
def total_of(sums):
    """Of the raised exps; NaN of a row without a finite greatest logit."""
    top, _, own, others, _, _ = sums
    return tl.where(tl.abs(top) == float("inf"), float("nan"), own + others)


@triton.jit
def inverse(x):
    one = tl.full(x.shape, 1.0, x.dtype)
    return one / x if x.dtype == tl.float64 else tl.div_rn(one, x)


@triton.jit
def shares(t, sums, EXACT: tl.constexpr):
    """p and 1 - p of classes; of the greatest the latter is what the others have."""
    top, origin, own, others, _, _ = sums
    total = total_of(sums)
    by = inverse(total)[:, None]
    e = exp_each_to(t, origin[:, None], EXACT)
    rest = tl.where(t == top[:, None], (others + (own - m.raised(t)))[:, None], total[:, None] - e)
    return e * by, rest * by


@triton.jit
def all_but(own_x, sums, EXACT: tl.constexpr):
    """The raised exps of all classes but one, of which there is the logit."""
    top, origin, own, others, _, _ = sums
    rest = own + others - exp_to(own_x, origin, EXACT)
    return tl.where(own_x == top, others + (own - m.raised(own)), rest)
