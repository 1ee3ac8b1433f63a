"""Connectionist temporal classification through Triton: a program a sequence, then one a row of the gradient.

As on the CPU a probability is a mantissa and an exponent of 2 (`csrc/ctc.h` says why), both of float64. What
lanes of a program hand to each other goes through memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
import triton
import triton.language as tl

from ...kinds.ctc import refuse_label
from ..plan import CtcPlan
from . import flags, m
from .engine import GpuEngine
from .launch import finish, launch, power_of_two, reporting, scratch

_ZERO = tl.constexpr(-1e300)  # the exponent of probability 0
_LOG2E = tl.constexpr(float.fromhex("0x1.71547652b82fep0"))
_LN2_HI = tl.constexpr(float.fromhex("0x1.62e42fefap-1"))
_LN2_LO = tl.constexpr(float.fromhex("0x1.cf79abc9e3b3ap-40"))
ARRAYS = 4  # of a row of states: mantissas and exponents of blanks, then of labels
CLASSES = 1024  # of a row of the gradient that a program takes at a time


@dataclass(frozen=True)
class LabelOutOfRange:
    """A label that is no class."""

    shape: torch.Size
    classes: int

    def fail(self, position: int, first: int, second: int) -> NoReturn:
        refuse_label(self.shape, position, first, self.classes)


class CtcEngine(GpuEngine[CtcPlan]):
    plan = CtcPlan

    def launch(self, plan: CtcPlan) -> None:
        call, x, (grad,) = plan.call, plan.x, plan.grads
        frames, n, classes = x.shape
        by = call.over(n)
        block, device = power_of_two(plan.most + 1), x.device
        rows = 2 if grad is None else frames + 2
        kept = scratch(n * rows * ARRAYS * block, device)
        partial = scratch(n, device)
        shared = {
            "lengths": plan.lengths.to(device),
            "targets": plan.targets,
            "kept": kept,
            "incoming": plan.incoming,
            "label_stride": plan.label_stride,
            "incoming_stride": 0 if plan.incoming is None else sum(plan.incoming.stride()),
            "rows": rows,
            "STORED": plan.stored,
            "BLOCK": block,
            "num_warps": min(max(block // 64, 1), 8),
        }
        launch(
            _align,
            n,
            device,
            **shared,
            x=x,
            loss=plan.losses,
            partial=partial,
            strides=x.stride(),
            n=n,
            classes=classes,
            blank=call.blank,
            near=1.0 if x.dtype == torch.float64 else 4e-8 * frames,
            **reporting(device, LabelOutOfRange(plan.targets.shape, classes)),
            MEAN=call.reduction == "mean",
            ZERO_INFINITY=call.zero_infinity,
            GRADIENT=grad is not None,
        )
        if grad is not None:
            out = plan.batch(grad)
            launch(
                _gather,
                n * frames,
                device,
                **shared,
                grad=out,
                strides=out.stride(),
                n=n,
                frames=frames,
                classes=classes,
                blank=call.blank,
                by=by,
                MEAN=call.reduction == "mean",
                CLASSES=min(power_of_two(classes), CLASSES),
            )
        if plan.total is not None:
            finish(partial, plan.total, by)


@triton.jit
def _power(k):
    """2^k for an integer k; 0 far below 1."""
    near = tl.minimum(tl.maximum(k, -1001.0), 1000.0)
    p = ((near.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(k < -1000.0, 0.0, p)


@triton.jit
def _scaled(mantissa, k):
    half = tl.floor(0.5 * tl.maximum(k, -2000.0))
    return tl.where(
        k < -1400.0, 0.0, mantissa * _power(half) * _power(tl.maximum(k, -2000.0) - half)
    )


@triton.jit
def _split(v):
    """exp(v) as a mantissa around 1 and an exponent."""
    far = tl.abs(v) > 1e15
    near = tl.where(far, 0.0, v)
    k = tl.floor(near * _LOG2E + 0.5)
    y = tl.exp((near - k * _LN2_HI) - k * _LN2_LO)
    zero = v < -7e299
    finite = v < 1e300
    mantissa = tl.where(zero, 0.0, tl.where(finite, y, float("nan")))
    exponent = tl.where(zero, _ZERO, tl.where(finite, tl.where(far, v * _LOG2E, k), 0.0))
    return mantissa, exponent


@triton.jit
def _normal(mantissa, exponent):
    bits = mantissa.to(tl.int64, bitcast=True)
    k = (bits >> 52) - 1023
    positive = mantissa > 0.0
    lowered = (bits - (k << 52)).to(tl.float64, bitcast=True)
    return tl.where(positive, lowered, mantissa), tl.where(
        positive, exponent + k.to(tl.float64), exponent
    )


@triton.jit
def _sum(a, ae, b, be, c, ce):
    top = tl.maximum(tl.maximum(ae, be), ce)
    return (a * _power(ae - top) + b * _power(be - top)) + c * _power(ce - top), top


@triton.jit
def _log_sum(a, b, c):
    """log(exp a + exp b + exp c), with the digits of what lies beside the greatest."""
    high = tl.maximum(a, b)
    top = tl.maximum(high, c)
    origin = tl.where(top == -float("inf"), 0.0, top)
    rest = m.exp(tl.minimum(a, b) - origin) + m.exp(tl.minimum(high, c) - origin)
    return top + m.log1p(rest)


@triton.jit
def _store_row(row, j, b, be, s, le, BLOCK: tl.constexpr):
    tl.store(row + j, b)
    tl.store(row + BLOCK + j, be)
    tl.store(row + 2 * BLOCK + j, s)
    tl.store(row + 3 * BLOCK + j, le)
    tl.debug_barrier()


@triton.jit
def _load_row(row, j, known, BLOCK: tl.constexpr):
    b = tl.load(row + j, mask=known, other=0.0)
    be = tl.load(row + BLOCK + j, mask=known, other=_ZERO)
    s = tl.load(row + 2 * BLOCK + j, mask=known, other=0.0)
    le = tl.load(row + 3 * BLOCK + j, mask=known, other=_ZERO)
    return b, be, s, le


@triton.jit
def _at_end(value, j, last):
    return tl.sum(tl.where(j == last, value, 0.0))


@triton.jit
def _frame(x, t, stride, own, blank, inside):
    """The probabilities of a frame: of each label, and of the blank."""
    y = tl.load(x + t * stride + own, mask=inside, other=0.0).to(tl.float64)
    z = tl.load(x + t * stride + blank + own * 0, mask=inside, other=0.0).to(tl.float64)
    return y, z


@triton.jit
def _forwards(x, stride, own, blank, skips, kept, frames, last, rows, j, BLOCK: tl.constexpr):
    """The states after the last frame; `kept` holds those after each."""
    inside = j <= last
    b = tl.where(j == 0, 1.0, 0.0).to(tl.float64)
    be = tl.where(j == 0, 0.0, _ZERO).to(tl.float64)
    s = tl.zeros((BLOCK,), tl.float64)
    le = tl.full((BLOCK,), _ZERO, tl.float64)
    _store_row(kept, j, b, be, s, le, BLOCK)
    for t in range(frames):
        before = kept + (t % rows) * (4 * BLOCK)
        pb, pbe, pl, ple = _load_row(before, j - 1, j > 0, BLOCK)
        y, z = _frame(x, t, stride, own, blank, inside)
        p, pe = _split(z)
        q, qe = _split(y)
        third = tl.where(skips, pl, 0.0)
        third_exponent = tl.where(skips, ple, _ZERO)
        new, top = _sum(b, be, s, le, b * 0.0, be)
        s, le = _sum(s, le, pb, pbe, third, third_exponent)
        real = (j > 0) & inside
        s = tl.where(real, s * q, 0.0)
        le = tl.where(real, le + qe, _ZERO)
        b = tl.where(inside, new * p, 0.0)
        be = tl.where(inside, top + pe, _ZERO)
        if t % 32 == 31:  # between these, mantissas grow and shrink by less than 2^80
            b, be = _normal(b, be)
            s, le = _normal(s, le)
        after = kept + ((t + 1) % rows) * (4 * BLOCK)
        _store_row(after, j, b, be, s, le, BLOCK)
    return b, be, s, le


@triton.jit
def _near_certainty(x, stride, own, blank, skips, memory, frames, last, j, BLOCK: tl.constexpr):
    """The loss in logarithms, which have digits where the sum is near 1."""
    none = -float("inf")
    inside = j <= last
    b = tl.where(j == 0, 0.0, none).to(tl.float64)
    s = tl.full((BLOCK,), none, tl.float64)
    for t in range(frames):
        row = memory + (t % 2) * 2 * BLOCK
        tl.store(row + j, b)
        tl.store(row + BLOCK + j, s)
        tl.debug_barrier()
        pb = tl.load(row + j - 1, mask=j > 0, other=none)
        pl = tl.load(row + BLOCK + j - 1, mask=j > 0, other=none)
        y, z = _frame(x, t, stride, own, blank, inside)
        nothing = tl.full((BLOCK,), none, tl.float64)
        new = z + _log_sum(b, s, nothing)
        s = tl.where((j > 0) & inside, y + _log_sum(s, pb, tl.where(skips, pl, none)), none)
        b = tl.where(inside, new, none)
    ends = tl.where(j == last, _log_sum(b, s, tl.full((BLOCK,), none, tl.float64)), 0.0)
    return -tl.sum(ends)


@triton.jit
def _backwards(
    x, stride, own, blank, skips, kept, frames, last, total, total_exponent, alive, j, BLOCK: tl.constexpr
):  # fmt: skip
    """What `kept` holds becomes the shares of the alignments, of blanks and of labels."""
    inside = j <= last
    ends = j == last
    b = tl.where(ends, 1.0, 0.0).to(tl.float64)
    be = tl.where(ends, 0.0, _ZERO).to(tl.float64)
    s = b
    le = be
    spare = kept + (frames + 1) * (4 * BLOCK)
    for back in range(frames):
        t = frames - 1 - back
        row = kept + (t + 1) * (4 * BLOCK)
        fb, fbe, fl, fle = _load_row(row, j, inside, BLOCK)
        of_blank = _scaled(fb * b / total, (fbe - total_exponent) + be)
        of_label = _scaled(fl * s / total, (fle - total_exponent) + le)
        tl.store(row + j, tl.where(alive, tl.where(inside, of_blank, 0.0), 0.0))
        of_label = tl.where(inside & (j > 0), of_label, 0.0)
        tl.store(row + 2 * BLOCK + j, tl.where(alive, of_label, 0.0))
        y, z = _frame(x, t, stride, own, blank, inside)
        p, pe = _split(z)
        q, qe = _split(y)
        stay = b * p
        stay_exponent = be + pe
        same = s * q
        same_exponent = le + qe
        # Beyond the last there is none; the halves of the spare row take turns.
        free = spare + (back % 2) * 2 * BLOCK
        real = (j > 0) & inside
        tl.store(free + j, tl.where(real, same, 0.0))
        tl.store(free + BLOCK + j, tl.where(real, same_exponent, _ZERO))
        tl.debug_barrier()
        on = tl.load(free + j + 1, mask=j + 1 < BLOCK, other=0.0)
        on_exponent = tl.load(free + BLOCK + j + 1, mask=j + 1 < BLOCK, other=_ZERO)
        leaps = skips
        third = tl.where(leaps, on, 0.0)
        third_exponent = tl.where(leaps, on_exponent, _ZERO)
        s, le = _sum(same, same_exponent, stay, stay_exponent, third, third_exponent)
        b, be = _sum(stay, stay_exponent, on, on_exponent, on * 0.0, on_exponent)
        if t % 32 == 0:
            b, be = _normal(b, be)
            s, le = _normal(s, le)


@triton.jit(do_not_specialize=["record", "blank"])
def _align(
    x, targets, lengths, kept, incoming, loss, partial,
    label_stride, incoming_stride, strides, n, classes, rows, blank, near: tl.float64,
    claim, words, record,
    MEAN: tl.constexpr, ZERO_INFINITY: tl.constexpr, GRADIENT: tl.constexpr, STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of a sequence, and the shares of its alignments by state."""
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    sequence = tl.program_id(0).to(tl.int64)
    frames = tl.load(lengths + sequence).to(tl.int32)
    last = tl.load(lengths + n + sequence).to(tl.int32)
    begin = targets + tl.load(lengths + 2 * n + sequence)
    j = tl.arange(0, BLOCK)
    real = (j > 0) & (j <= last)
    y = tl.load(begin + (j - 1) * label_stride, mask=real, other=0).to(tl.int64)
    before = tl.load(begin + (j - 2) * label_stride, mask=real & (j > 1), other=0).to(tl.int64)
    after = tl.load(begin + j * label_stride, mask=real & (j < last), other=0).to(tl.int64)
    bad = real & ((y < 0) | (y >= classes))
    far = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    first = tl.min(tl.where(bad, j, far))
    wrong = tl.where(first == 0x7FFFFFFF, 0, 1)
    if words is not None:
        if wrong == 1:
            value = tl.sum(tl.where(j == first, y, 0))
            place = tl.load(lengths + 3 * n + sequence) + first - 1
            flags.report(claim, words, record, place, value, value)
    own = tl.where(bad | ~real, blank, y) * strides[2]
    of_blank = blank * strides[2]
    x += sequence * strides[1]
    kept += sequence * rows * 4 * BLOCK
    b, be, s, le = _forwards(
        x, strides[0], own, of_blank, real & (j > 1) & (y != before), kept, frames, last, rows, j, BLOCK
    )  # fmt: skip
    be_last = _at_end(be, j, last)
    le_last = _at_end(le, j, last)
    total_exponent = tl.maximum(be_last, le_last)
    total = _at_end(b, j, last) * _power(be_last - total_exponent) + _at_end(s, j, last) * _power(
        le_last - total_exponent
    )
    alive = (total != 0.0) & (wrong == 0)
    value = -(total_exponent * _LN2_HI + (tl.log(total) + total_exponent * _LN2_LO))
    value = tl.where(total == 0.0, float("inf"), value)
    if GRADIENT:
        skips = real & (j < last) & (y != after)
        _backwards(
            x, strides[0], own, of_blank, skips, kept, frames, last, total, total_exponent, alive, j, BLOCK
        )  # fmt: skip
    if value < near:
        tl.debug_barrier()
        memory = kept + (rows - 1) * (4 * BLOCK)
        skips = real & (j > 1) & (y != before)
        value = _near_certainty(x, strides[0], own, of_blank, skips, memory, frames, last, j, BLOCK)
    if ZERO_INFINITY:
        value = tl.where(value == float("inf"), 0.0, value)
    value = tl.where(wrong == 1, float("nan"), value)
    if loss is not None:
        tl.store(loss + sequence, value.to(loss.dtype.element_ty))
    if MEAN:
        value = value / tl.maximum(last, 1)
    tl.store(partial + sequence, value)


@triton.jit(do_not_specialize=["blank"])
def _gather(
    targets, lengths, kept, incoming, grad,
    label_stride, incoming_stride, strides, n, frames, classes, rows, blank, by: tl.float64,
    MEAN: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """A row of the gradient from the shares of the states, in the order of the labels."""
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    row = tl.program_id(0).to(tl.int64)
    sequence = row % n
    t = row // n
    counted = t < tl.load(lengths + sequence)
    last = tl.load(lengths + n + sequence).to(tl.int32)
    begin = targets + tl.load(lengths + 2 * n + sequence)
    shares = kept + (sequence * rows + tl.where(counted, t, 0) + 1) * 4 * BLOCK
    j = tl.arange(0, BLOCK)
    of_blank = tl.sum(tl.load(shares + j, mask=j <= last, other=0.0))
    scale = tl.full((), -1.0, tl.float64)
    if incoming is not None:
        scale = -tl.load(incoming + sequence * incoming_stride).to(tl.float64)
    if MEAN:
        scale = scale / (tl.maximum(last, 1).to(tl.float64) * by)
    grad += t * strides[0] + sequence * strides[1]
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        total = tl.where(c == blank, of_blank, 0.0)
        for place in range(last):
            y = tl.load(begin + place * label_stride).to(tl.int64)
            share = tl.load(shares + 2 * BLOCK + place + 1)
            total += tl.where(c == y, share, 0.0)
        # Of what no alignment comes by, not even an infinite gradient arrives.
        slope = tl.where(counted & (total != 0.0), total * scale, 0.0)
        tl.store(grad + c * strides[2], slope.to(grad.dtype.element_ty), mask=c < classes)
