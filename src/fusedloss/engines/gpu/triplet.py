"""The triplet margin loss through Triton, with the gradients of all three inputs.

Distances are summed in float64, where squares of float32 neither overflow nor underflow; those of
float64, and powers other than 1 and 2, are taken of ratios to the largest coordinate.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...core import reduce
from ..plan import TripletPlan
from .engine import GpuEngine
from .launch import ceil_div, finish, launch, power_of_two, scratch
from .pointwise import TRITON

WIDEST = 4096  # features that a program holds in registers


class TripletEngine(GpuEngine[TripletPlan]):
    plan = TripletPlan

    def launch(self, plan: TripletPlan) -> None:
        call, losses, total, incoming = plan.call, plan.losses, plan.total, plan.incoming
        shape = plan.rows, plan.features
        flat = [*plan.flat, *(None if g is None else g.reshape(shape) for g in plan.grads)]
        strides = [(0, 0) if t is None else t.stride() for t in flat]
        compute = reduce.wide(*plan.flat)
        block = min(power_of_two(plan.features), WIDEST)
        per_program = max(1, 2048 // block)
        programs = ceil_div(plan.rows, per_program)
        device = plan.flat[0].device
        partial = None
        if total is not None and programs > 1:
            partial = scratch(programs, device)
        denominator = float(plan.rows) if call.reduction == "mean" else 1.0
        launch(
            _triplet_rows,
            programs,
            device,
            anchor=flat[0],
            positive=flat[1],
            negative=flat[2],
            grad0=flat[3],
            grad1=flat[4],
            grad2=flat[5],
            incoming=incoming,
            loss=None if losses is None else losses.reshape(plan.rows),
            partial=partial,
            result=total if partial is None else None,
            rows=plan.rows,
            features=plan.features,
            strides=tuple(strides),
            incoming_stride=0 if incoming is None else incoming.stride(0),
            margin=call.margin,
            degree=call.p,
            eps=call.eps,
            denominator=denominator,
            P=int(call.p) if call.p in (1.0, 2.0) else -1 if math.isinf(call.p) else 0,
            SWAP=call.swap,
            STORED=plan.stored,
            SINGLE=block >= plan.features,
            COMPUTE=TRITON[compute],
            ROWS=per_program,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )
        if partial is not None and total is not None:
            finish(partial, total, denominator)


@triton.jit
def _at(tensor, strides, row, feature):
    return tensor + (row * strides[0])[:, None] + (feature.to(tl.int64) * strides[1])[None, :]


@triton.jit
def _load(tensor, strides, row, feature, known, COMPUTE: tl.constexpr):
    return tl.load(_at(tensor, strides, row, feature), mask=known, other=0.0).to(COMPUTE)


@triton.jit
def _difference(a, b, eps, known):
    return tl.where(known, a - b + eps, 0.0)


@triton.jit
def _largest(v):
    """The largest magnitude of each row, or NaN."""
    size = tl.abs(v)
    nan = tl.max((v != v).to(tl.int32), 1) > 0
    return tl.where(nan, float("nan"), tl.max(size, 1)).to(tl.float64)


@triton.jit
def _ratio(v, largest):
    """|v| / largest, where that is a number between 0 and 1."""
    usable = (largest > 0.0) & (largest < float("inf"))
    return tl.abs(v).to(tl.float64) / tl.where(usable, largest, 1.0)[:, None]


@triton.jit
def _power(ratio, degree):
    """ratio^degree, 0 at 0, for ratios up to 1."""
    positive = tl.where(ratio > 0.0, ratio, 1.0)
    return tl.where(ratio > 0.0, tl.exp(degree * tl.log(positive)), ratio)


@triton.jit
def _term(v, largest, degree, P: tl.constexpr, COMPUTE: tl.constexpr):
    """What is summed over a row: the power of the ratio, or of the coordinate where that is safe."""
    if P == 1:
        return tl.abs(v).to(tl.float64)
    elif P == 2 and tl.float32 == COMPUTE:
        return v.to(tl.float64) * v.to(tl.float64)
    elif P == 2:
        return _ratio(v, largest) * _ratio(v, largest)
    elif P == 0:
        return _power(_ratio(v, largest), degree)
    else:
        return (tl.abs(v).to(tl.float64) == largest[:, None]).to(tl.float64)


@triton.jit
def _norm(total, largest, degree, P: tl.constexpr, COMPUTE: tl.constexpr):
    usable = (largest > 0.0) & (largest < float("inf"))
    if P == 1:
        return total
    elif P == 2 and tl.float32 == COMPUTE:
        return tl.sqrt(total)
    elif P == 2:
        return tl.where(usable, largest * tl.sqrt(tl.where(usable, total, 1.0)), largest)
    elif P == 0:
        power = tl.exp(tl.log(tl.where(usable, total, 1.0)) / degree)
        return tl.where(usable, largest * power, largest)
    else:
        return largest


@triton.jit
def _slope(v, scale, norm, ties, degree, P: tl.constexpr):
    """The derivative of the norm by v, times scale; 0 at distance 0 and where scale is 0."""
    sign = tl.where(v > 0.0, 1.0, tl.where(v < 0.0, -1.0, v)).to(v.dtype)
    off = (scale == 0.0) | (norm == 0.0)
    safe = tl.where(off, 1.0, norm)
    if P == 2:
        slope = (scale / safe).to(v.dtype)[:, None] * v
    elif P == 1:
        slope = scale.to(v.dtype)[:, None] * sign
    elif P == 0:
        # Of the ratio to the distance, so that no power leaves the range; 0 where a coordinate is.
        ratio = tl.abs(v).to(tl.float64) / safe[:, None]
        steep = _power(ratio, degree - 1.0)
        slope = tl.where(ratio == 0.0, 0.0, scale[:, None] * steep).to(v.dtype) * sign
    else:
        # The largest coordinates share the derivative evenly.
        share = (scale / tl.where(ties > 0.0, ties, 1.0)).to(v.dtype)
        is_largest = tl.abs(v).to(tl.float64) == norm[:, None]
        slope = tl.where(is_largest, share[:, None] * sign, tl.where(v != v, v, 0.0))
    return tl.where(off[:, None], 0.0, slope)


@triton.jit
def _distance(
    a,
    b,
    a_strides,
    b_strides,
    row,
    inside,
    features,
    eps,
    degree,
    P: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """|a - b + eps|_p of each row, and how many coordinates are the largest: by blocks of features."""
    step = tl.arange(0, BLOCK)
    largest = tl.zeros((ROWS,), tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    if not (P == 1 or (P == 2 and tl.float32 == COMPUTE)):
        for start in range(0, features, BLOCK):
            f = start + step
            known = inside[:, None] & (f < features)[None, :]
            u = _load(a, a_strides, row, f, known, COMPUTE)
            v = _difference(u, _load(b, b_strides, row, f, known, COMPUTE), eps, known)
            here = _largest(v)
            largest = tl.where((here > largest) | (here != here), here, largest)
    for start in range(0, features, BLOCK):
        f = start + step
        known = inside[:, None] & (f < features)[None, :]
        u = _load(a, a_strides, row, f, known, COMPUTE)
        v = _difference(u, _load(b, b_strides, row, f, known, COMPUTE), eps, known)
        total += tl.sum(tl.where(known, _term(v, largest, degree, P, COMPUTE), 0.0), 1)
    return _norm(total, largest, degree, P, COMPUTE), total


@triton.jit
def _distance_of(v, known, degree, P: tl.constexpr, COMPUTE: tl.constexpr):
    """The same of differences in registers."""
    largest = _largest(v)
    total = tl.sum(tl.where(known, _term(v, largest, degree, P, COMPUTE), 0.0), 1)
    return _norm(total, largest, degree, P, COMPUTE), total


@triton.jit
def _write(
    grad0, grad1, grad2, strides, row, f, known, near, far, other,
    scales, norms, ties, degree, P: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """The gradients of a block, from the three differences."""
    s0 = _slope(near, scales[0], norms[0], ties[0], degree, P)
    s1 = -s0
    s2 = _slope(far, scales[1], norms[1], ties[1], degree, P)
    s0 += s2
    s2 = -s2
    if SWAP:
        between = _slope(other, scales[2], norms[2], ties[2], degree, P)
        s1 += between
        s2 -= between
    if grad0 is not None:
        tl.store(_at(grad0, strides[3], row, f), s0.to(grad0.dtype.element_ty), mask=known)
    if grad1 is not None:
        tl.store(_at(grad1, strides[4], row, f), s1.to(grad1.dtype.element_ty), mask=known)
    if grad2 is not None:
        tl.store(_at(grad2, strides[5], row, f), s2.to(grad2.dtype.element_ty), mask=known)


@triton.jit
def _triplet_rows(
    anchor,
    positive,
    negative,
    grad0,
    grad1,
    grad2,
    incoming,
    loss,
    partial,
    result,
    rows,
    features,
    strides,
    incoming_stride,
    margin: tl.float64,
    degree: tl.float64,
    eps: tl.float64,
    denominator: tl.float64,
    P: tl.constexpr,
    SWAP: tl.constexpr,
    STORED: tl.constexpr,
    SINGLE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    step = tl.arange(0, BLOCK)
    added = tl.full((), eps, COMPUTE)
    p = tl.full((), degree, tl.float64)
    other = tl.zeros((ROWS,), tl.float64)
    ties_other = other
    if SINGLE:
        known = inside[:, None] & (step < features)[None, :]
        a = _load(anchor, strides[0], row, step, known, COMPUTE)
        b = _load(positive, strides[1], row, step, known, COMPUTE)
        c = _load(negative, strides[2], row, step, known, COMPUTE)
        to_positive = _difference(a, b, added, known)
        to_negative = _difference(a, c, added, known)
        swapped = to_negative
        near, ties_near = _distance_of(to_positive, known, p, P, COMPUTE)
        far, ties_far = _distance_of(to_negative, known, p, P, COMPUTE)
        if SWAP:
            swapped = _difference(b, c, added, known)
            other, ties_other = _distance_of(swapped, known, p, P, COMPUTE)
    else:
        near, ties_near = _distance(
            anchor, positive, strides[0], strides[1], row, inside, features, added, p,
            P, COMPUTE, ROWS, BLOCK,
        )  # fmt: skip
        far, ties_far = _distance(
            anchor, negative, strides[0], strides[2], row, inside, features, added, p,
            P, COMPUTE, ROWS, BLOCK,
        )  # fmt: skip
        if SWAP:
            other, ties_other = _distance(
                positive, negative, strides[1], strides[2], row, inside, features, added, p,
                P, COMPUTE, ROWS, BLOCK,
            )  # fmt: skip
    least = far
    by_far = tl.full((ROWS,), 1.0, tl.float64)
    if SWAP:
        # As torch.minimum: NaN passes on, a tie shares the derivative.
        by_far = tl.where(far < other, 1.0, tl.where(other < far, 0.0, 0.5))
        least = tl.where((other < far) | (other != other), other, far)
    hinge = tl.full((), margin, tl.float64) + near - least
    value = tl.where(inside, tl.where(hinge < 0.0, 0.0, hinge), 0.0)
    if loss is not None:
        tl.store(loss + row, value.to(loss.dtype.element_ty), mask=inside)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(value))
    if result is not None:
        tl.store(result, (tl.sum(value) / denominator).to(result.dtype.element_ty))
    if (grad0 is not None) | (grad1 is not None) | (grad2 is not None):
        g = tl.full((ROWS,), 1.0, tl.float64) / denominator
        if incoming is not None:
            at = incoming + row * incoming_stride
            g *= tl.load(at, mask=inside, other=0.0).to(tl.float64)
        g = tl.where(hinge < 0.0, 0.0, g)
        scales = (g, -g * by_far, -g * (1.0 - by_far))
        norms = (near, far, other)
        ties = (ties_near, ties_far, ties_other)
        if SINGLE:
            _write(
                grad0, grad1, grad2, strides, row, step, known,
                to_positive, to_negative, swapped, scales, norms, ties, p, P, SWAP,
            )  # fmt: skip
        else:
            for start in range(0, features, BLOCK):
                f = start + step
                known = inside[:, None] & (f < features)[None, :]
                a = _load(anchor, strides[0], row, f, known, COMPUTE)
                b = _load(positive, strides[1], row, f, known, COMPUTE)
                c = _load(negative, strides[2], row, f, known, COMPUTE)
                _write(
                    grad0, grad1, grad2, strides, row, f, known,
                    _difference(a, b, added, known), _difference(a, c, added, known),
                    _difference(b, c, added, known), scales, norms, ties, p, P, SWAP,
                )  # fmt: skip
