"""Losses of rows through Triton, with the gradients of all operands: one kernel for all definitions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core import reduce
from ...kinds.reduction import (
    MEASURES,
    NUMBERS,
    OPERANDS,
    Distances,
    Reduction,
    ReductionCall,
    Sums,
)
from ..plan import ReductionPlan, Slot
from . import norms
from .engine import GpuEngine
from .launch import ceil_div, finish, launch, power_of_two, scratch
from .pointwise import TRITON
from .rebind import as_triton

WIDEST = 4096  # features that a program holds in registers


class Bound(NamedTuple):
    """The functions of a definition, each with as many parameters as the kernel hands to it."""

    value: Any
    grad: Any
    map: Any | None
    slope: Any | None


@functools.cache
def bound(record: Reduction) -> Bound:
    measure, projection = record.measure, record.projection
    numbers = _padded(record.params, NUMBERS, "number")
    measures = _padded(projection.operands[: measure.count], MEASURES, "measure")
    given = (*measures, record.label or "_label", *numbers)
    value, grad = (as_triton(f, given) for f in (projection.value, projection.grad))
    if not isinstance(measure, Sums):
        return Bound(value, grad, None, None)
    operands = _padded(measure.operands, OPERANDS, "operand")
    by = _padded(measure.by, MEASURES, "by")
    map = as_triton(measure.map, (*operands, *numbers))
    return Bound(value, grad, map, as_triton(measure.slope, (*operands, *by, *numbers)))


def _padded(names: Sequence[str], count: int, what: str) -> tuple[str, ...]:
    return (*names, *(f"_{what}{k}" for k in range(len(names), count)))


class ReductionEngine(GpuEngine[ReductionPlan]):
    plan = ReductionPlan

    def launch(self, plan: ReductionPlan) -> None:
        losses, total, incoming = plan.losses, plan.total, plan.incoming
        rows, features = plan.rows, plan.features
        flat: list[Slot] = [*plan.flat, *(None,) * (OPERANDS - len(plan.flat))]
        flat += [None if g is None else g.reshape(rows, features) for g in plan.grads]
        flat += [None] * (2 * OPERANDS - len(flat))
        block = min(power_of_two(features), WIDEST)
        per_program = max(1, 2048 // block)
        programs = ceil_div(rows, per_program)
        device = plan.flat[0].device
        partial = scratch(programs, device) if total is not None and programs > 1 else None
        denominator = plan.call.over(rows)
        names = ("first", "second", "third", "grad0", "grad1", "grad2")
        launch(
            _reduce_rows,
            programs,
            device,
            **dict(zip(names, flat, strict=True)),
            incoming=incoming,
            loss=None if losses is None else losses.reshape(rows),
            partial=partial,
            result=total if partial is None else None,
            rows=rows,
            features=features,
            strides=tuple((0, 0) if t is None else t.stride() for t in flat),
            incoming_stride=0 if incoming is None else incoming.stride(0),
            denominator=denominator,
            STORED=plan.stored,
            SINGLE=block >= features,
            ROWS=per_program,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
            **_settings(plan.call, plan.flat),
        )
        if partial is not None and total is not None:
            finish(partial, total, denominator)


def _settings(call: ReductionCall, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """What the kernel takes from the definition."""
    record = call.record
    functions, count = bound(record), len(record.measure.operands)
    distances = isinstance(record.measure, Distances)
    p = call.numbers[0] if distances else 0.0
    numbers = (*call.numbers, *(0.0,) * NUMBERS)[:NUMBERS]
    return {
        **{f"n{k}": number for k, number in enumerate(numbers)},
        "VALUE": functions.value,
        "GRAD": functions.grad,
        "MAP": functions.map,
        "SLOPE": functions.slope,
        "COUNT": record.measure.count,
        "OPERANDS": count,
        "LABEL": record.label is not None,
        "P": int(p) if p in (1.0, 2.0) else -1 if math.isinf(p) else 0,
        "COMPUTE": TRITON[reduce.wide(*inputs[:count])] if distances else tl.float64,
    }


@triton.jit
def _at(tensor, strides, row, feature):
    return tensor + (row * strides[0])[:, None] + (feature.to(tl.int64) * strides[1])[None, :]


@triton.jit
def _load(tensor, strides, row, feature, known, COMPUTE: tl.constexpr):
    return tl.load(_at(tensor, strides, row, feature), mask=known, other=0.0).to(COMPUTE)


@triton.jit
def _known(inside, feature, features):
    return inside[:, None] & (feature < features)[None, :]


@triton.jit
def _differences(
    x, strides, row, inside, feature, features, eps, COUNT: tl.constexpr, COMPUTE: tl.constexpr
):
    """Those of a block's pairs of operands, the first again for pairs that there are not."""
    known = _known(inside, feature, features)
    a = _load(x[0], strides[0], row, feature, known, COMPUTE)
    b = _load(x[1], strides[1], row, feature, known, COMPUTE)
    ab = norms.difference(a, b, eps, known)
    ac = ab
    bc = ab
    if COUNT > 1:
        c = _load(x[2], strides[2], row, feature, known, COMPUTE)
        ac = norms.difference(a, c, eps, known)
        if COUNT > 2:
            bc = norms.difference(b, c, eps, known)
    return ab, ac, bc


@triton.jit
def _distance_of(v, known, degree, P: tl.constexpr, COMPUTE: tl.constexpr):
    """|v|_p of each row, and how many coordinates are the largest: of differences in registers."""
    largest = norms.largest(v)
    total = tl.sum(tl.where(known, norms.term(v, largest, degree, P, COMPUTE), 0.0), 1)
    return norms.norm(total, largest, degree, P, COMPUTE), total


@triton.jit
def _larger(largest, v):
    here = norms.largest(v)
    return tl.where((here > largest) | (here != here), here, largest)


@triton.jit
def _added(total, v, largest, known, degree, P: tl.constexpr, COMPUTE: tl.constexpr):
    return total + tl.sum(tl.where(known, norms.term(v, largest, degree, P, COMPUTE), 0.0), 1)


@triton.jit
def _distances(
    x, strides, row, inside, features, eps, degree,
    COUNT: tl.constexpr, P: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same by blocks of features, for each pair."""
    step = tl.arange(0, BLOCK)
    zero = tl.zeros((ROWS,), tl.float64)
    top0, top1, top2 = zero, zero, zero
    sum0, sum1, sum2 = zero, zero, zero
    if not (P == 1 or (P == 2 and tl.float32 == COMPUTE)):
        for start in range(0, features, BLOCK):
            f = start + step
            ab, ac, bc = _differences(x, strides, row, inside, f, features, eps, COUNT, COMPUTE)
            top0 = _larger(top0, ab)
            if COUNT > 1:
                top1 = _larger(top1, ac)
            if COUNT > 2:
                top2 = _larger(top2, bc)
    for start in range(0, features, BLOCK):
        f = start + step
        known = _known(inside, f, features)
        ab, ac, bc = _differences(x, strides, row, inside, f, features, eps, COUNT, COMPUTE)
        sum0 = _added(sum0, ab, top0, known, degree, P, COMPUTE)
        if COUNT > 1:
            sum1 = _added(sum1, ac, top1, known, degree, P, COMPUTE)
        if COUNT > 2:
            sum2 = _added(sum2, bc, top2, known, degree, P, COMPUTE)
    norm0 = norms.norm(sum0, top0, degree, P, COMPUTE)
    norm1 = norms.norm(sum1, top1, degree, P, COMPUTE)
    norm2 = norms.norm(sum2, top2, degree, P, COMPUTE)
    return (norm0, norm1, norm2), (sum0, sum1, sum2)


@triton.jit
def _slopes_of_distances(
    ab, ac, bc, by, lengths, ties, degree, COUNT: tl.constexpr, P: tl.constexpr
):
    """The derivatives by the operands, for a block of differences."""
    s0 = norms.slope(ab, by[0], lengths[0], ties[0], degree, P)
    s1 = -s0
    s2 = s1
    if COUNT > 1:
        s2 = norms.slope(ac, by[1], lengths[1], ties[1], degree, P)
        s0 += s2
        s2 = -s2
    if COUNT > 2:
        between = norms.slope(bc, by[2], lengths[2], ties[2], degree, P)
        s1 += between
        s2 -= between
    return s0, s1, s2


@triton.jit
def _operands(x, strides, row, inside, feature, features, OPERANDS: tl.constexpr):
    """A block of each in float64, the first again for a third that there is not."""
    known = _known(inside, feature, features)
    a = _load(x[0], strides[0], row, feature, known, tl.float64)
    b = _load(x[1], strides[1], row, feature, known, tl.float64)
    c = a
    if OPERANDS > 2:
        c = _load(x[2], strides[2], row, feature, known, tl.float64)
    return a, b, c


@triton.jit
def _sums(
    x, strides, row, inside, features, n,
    MAP: tl.constexpr, COUNT: tl.constexpr, OPERANDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the map gives of each place, summed along the rows."""
    step = tl.arange(0, BLOCK)
    zero = tl.zeros((ROWS,), tl.float64)
    sum0, sum1, sum2 = zero, zero, zero
    for start in range(0, features, BLOCK):
        f = start + step
        known = _known(inside, f, features)
        a, b, c = _operands(x, strides, row, inside, f, features, OPERANDS)
        terms = MAP(a, b, c, n[0], n[1], n[2], n[3])
        sum0 += tl.sum(tl.where(known, terms[0], 0.0), 1)
        if COUNT > 1:
            sum1 += tl.sum(tl.where(known, terms[1], 0.0), 1)
        if COUNT > 2:
            sum2 += tl.sum(tl.where(known, terms[2], 0.0), 1)
    return sum0, sum1, sum2


@triton.jit
def _store(grads, strides, row, feature, known, slopes):
    """The gradients of a block; the strides of the operands come first."""
    for k in tl.static_range(3):
        if grads[k] is not None:
            at = _at(grads[k], strides[3 + k], row, feature)
            tl.store(at, slopes[k].to(grads[k].dtype.element_ty), mask=known)


@triton.jit
def _arriving(slope, g):
    """What a loss does not depend on stops even what is infinite."""
    by = slope.to(tl.float64)
    return tl.where(by == 0.0, 0.0, g * by)


@triton.jit
def _derivatives(measures, own, n, g, GRAD: tl.constexpr, COUNT: tl.constexpr):
    """Of the loss of each row by its measures, times g."""
    slopes = GRAD(measures[0], measures[1], measures[2], own, n[0], n[1], n[2], n[3])
    by0 = _arriving(slopes[0], g)
    by1 = by0
    by2 = by0
    if COUNT > 1:
        by1 = _arriving(slopes[1], g)
    if COUNT > 2:
        by2 = _arriving(slopes[2], g)
    return by0, by1, by2


@triton.jit
def _numbers(n0, n1, n2, n3):
    a = tl.full((), n0, tl.float64)
    b = tl.full((), n1, tl.float64)
    c = tl.full((), n2, tl.float64)
    d = tl.full((), n3, tl.float64)
    return a, b, c, d


@triton.jit
def _reduce_rows(
    first, second, third, grad0, grad1, grad2, incoming, loss, partial, result,
    rows, features, strides, incoming_stride,
    n0: tl.float64, n1: tl.float64, n2: tl.float64, n3: tl.float64, denominator: tl.float64,
    VALUE: tl.constexpr, GRAD: tl.constexpr, MAP: tl.constexpr, SLOPE: tl.constexpr,
    COUNT: tl.constexpr, OPERANDS: tl.constexpr, LABEL: tl.constexpr, P: tl.constexpr,
    STORED: tl.constexpr, SINGLE: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    step = tl.arange(0, BLOCK)
    known = _known(inside, step, features)
    x = (first, second, third)
    grads = (grad0, grad1, grad2)
    n = _numbers(n0, n1, n2, n3)
    eps = tl.full((), n1, COMPUTE)
    own = tl.zeros((ROWS,), tl.float64)
    if LABEL:
        own = tl.load(x[OPERANDS] + row * strides[OPERANDS][0], mask=inside, other=0.0).to(
            tl.float64
        )
    ties = (own, own, own)
    if MAP is not None:
        measures = _sums(x, strides, row, inside, features, n, MAP, COUNT, OPERANDS, ROWS, BLOCK)
    elif SINGLE:
        ab, ac, bc = _differences(x, strides, row, inside, step, features, eps, COUNT, COMPUTE)
        near, ties0 = _distance_of(ab, known, n[0], P, COMPUTE)
        far, ties1 = _distance_of(ac, known, n[0], P, COMPUTE)
        other, ties2 = _distance_of(bc, known, n[0], P, COMPUTE)
        measures = (near, far, other)
        ties = (ties0, ties1, ties2)
    else:
        measures, ties = _distances(
            x, strides, row, inside, features, eps, n[0], COUNT, P, COMPUTE, ROWS, BLOCK
        )
    value = VALUE(measures[0], measures[1], measures[2], own, n[0], n[1], n[2], n[3])
    value = tl.where(inside, value, 0.0)
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
        by = _derivatives(measures, own, n, g, GRAD, COUNT)
        if MAP is None and SINGLE:
            slopes = _slopes_of_distances(ab, ac, bc, by, measures, ties, n[0], COUNT, P)
            _store(grads, strides, row, step, known, slopes)
        else:
            for start in range(0, features, BLOCK):
                f = start + step
                if MAP is None:
                    ab, ac, bc = _differences(
                        x, strides, row, inside, f, features, eps, COUNT, COMPUTE
                    )
                    slopes = _slopes_of_distances(ab, ac, bc, by, measures, ties, n[0], COUNT, P)
                else:
                    a, b, c = _operands(x, strides, row, inside, f, features, OPERANDS)
                    d0, d1, d2 = by[0][:, None], by[1][:, None], by[2][:, None]
                    slopes = SLOPE(a, b, c, d0, d1, d2, n[0], n[1], n[2], n[3])
                _store(grads, strides, row, f, _known(inside, f, features), slopes)
