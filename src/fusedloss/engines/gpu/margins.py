"""Losses of margins through Triton, with their gradient: rows of labels against rows of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
import triton
import triton.language as tl

from ...core import errors, reduce
from ..plan import MarginPlan
from . import flags
from .engine import GpuEngine
from .launch import ceil_div, finish, launch, power_of_two, reporting, scratch
from .pointwise import TRITON

WIDEST = 4096  # classes that a program holds in registers


@dataclass(frozen=True)
class NotALabel:
    """A label that is out of range."""

    function: str
    shape: torch.Size
    classes: int
    sets: bool
    unsigned: bool

    def fail(self, position: int, first: int, second: int) -> NoReturn:
        value = first % 2**64 if self.unsigned else first
        errors.not_a_label(self.function, self.shape, position, value, self.classes, self.sets)


class MarginEngine(GpuEngine[MarginPlan]):
    plan = MarginPlan

    def launch(self, plan: MarginPlan) -> None:
        call, x, target, incoming, total = plan.call, plan.x, plan.target, plan.incoming, plan.total
        rows, classes = x.shape
        block = min(power_of_two(classes), WIDEST)
        per_program = max(1, 2048 // block)
        programs = ceil_div(rows, per_program)
        partial = scratch(programs, x.device) if total is not None and programs > 1 else None
        denominator = call.over(rows)
        grad = None if plan.grads[0] is None else plan.grads[0].reshape(rows, classes)
        given = plan.tensors[1]
        assert given is not None
        unsigned = given.dtype is torch.uint64
        record = NotALabel(call.loss, given.shape, classes, call.sets, unsigned)
        launch(
            _margins,
            programs,
            x.device,
            x=x,
            target=target,
            weight=plan.weight,
            incoming=incoming,
            loss=None if plan.losses is None else plan.losses.reshape(rows),
            grad=grad,
            partial=partial,
            result=total if partial is None else None,
            rows=rows,
            classes=classes,
            labels=target.shape[1],
            x_strides=x.stride(),
            target_strides=target.stride(),
            grad_strides=(0, 0) if grad is None else grad.stride(),
            incoming_stride=0 if incoming is None else incoming.stride(0),
            margin=call.margin,
            denominator=denominator,
            **reporting(x.device, record),
            SETS=call.sets,
            SQUARED=call.squared,
            STORED=plan.stored,
            SINGLE=block >= classes,
            COMPUTE=TRITON[reduce.wide(x)],
            ROWS=per_program,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )
        if partial is not None and total is not None:
            finish(partial, total, denominator)


@triton.jit
def _label(target, strides, row, k, alive, classes):
    """Label k of each row that has one: which rows these are, and it."""
    y = tl.load(target + row * strides[0] + k * strides[1], mask=alive, other=-1).to(tl.int64)
    return alive & (y >= 0) & (y < classes), y


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def _marked(
    target, strides, row, inside, feature, classes, labels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Which classes of a block are labels of each row."""
    found = tl.zeros((ROWS, BLOCK), tl.int32)
    k = 0
    alive = inside
    while (k < labels) & _any(alive):
        alive, y = _label(target, strides, row, k, alive, classes)
        found = found | (alive[:, None] & (feature[None, :] == y[:, None])).to(tl.int32)
        k += 1
    return found != 0


@triton.jit
def _block(x, strides, row, inside, feature, classes, COMPUTE: tl.constexpr):
    known = inside[:, None] & (feature < classes)[None, :]
    at = x + (row * strides[0])[:, None] + (feature * strides[1])[None, :]
    return tl.load(at, mask=known, other=0.0).to(COMPUTE), known


@triton.jit
def _passed(values, own, counts, margin, SQUARED: tl.constexpr):
    """The gaps that count, and their derivatives."""
    gap = margin + (values - own[:, None])
    counts = counts & ((gap > 0.0) | (gap != gap))
    gap = tl.where(counts, gap, 0.0)
    if SQUARED:
        slope = gap * 2.0
        gap = gap * gap
    else:
        slope = counts.to(values.dtype)
    return gap, slope


@triton.jit
def _whole_slope(
    x, x_strides, target, strides, row, inside, alive, own, margin, classes, labels,
    SQUARED: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a label of each row, over all blocks."""
    total = tl.zeros((ROWS,), COMPUTE)
    step = tl.arange(0, BLOCK).to(tl.int64)
    for start in range(0, classes, BLOCK):
        f = start + step
        values, known = _block(x, x_strides, row, inside, f, classes, COMPUTE)
        marked = _marked(target, strides, row, inside, f, classes, labels, ROWS, BLOCK)
        counts = known & ~marked & alive[:, None]
        _, slope = _passed(values, own, counts, margin, SQUARED)
        total += tl.sum(slope, 1)
    return total


@triton.jit
def _bad_rows(
    target, strides, row, inside, classes, labels, claim, words, record,
    SETS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows with a label out of range, which is told."""
    bad = tl.zeros((ROWS,), tl.int32)
    for start in range(0, labels, BLOCK):
        k = start + tl.arange(0, BLOCK).to(tl.int64)
        known = inside[:, None] & (k < labels)[None, :]
        at = target + (row * strides[0])[:, None] + (k * strides[1])[None, :]
        y = tl.load(at, mask=known, other=0).to(tl.int64)
        if SETS:
            outside = known & ((y < -1) | (y >= classes))
        else:
            outside = known & ((y < 0) | (y >= classes))
        bad = bad | tl.max(outside.to(tl.int32), 1)
        if words is not None:
            position = (row * labels)[:, None] + k[None, :]
            far = tl.full((ROWS, BLOCK), 0x7FFFFFFFFFFFFFFF, tl.int64)
            first = tl.min(tl.min(tl.where(outside, position, far), 1), 0)
            if first != 0x7FFFFFFFFFFFFFFF:
                value = tl.sum(tl.sum(tl.where(position == first, y, 0), 1), 0)
                flags.report(claim, words, record, first, value, value)
    return bad != 0


@triton.jit(do_not_specialize=["record"])
def _margins(
    x, target, weight, incoming, loss, grad, partial, result,
    rows, classes, labels, x_strides, target_strides, grad_strides, incoming_stride,
    margin: tl.float64, denominator: tl.float64, claim, words, record,
    SETS: tl.constexpr, SQUARED: tl.constexpr, STORED: tl.constexpr, SINGLE: tl.constexpr,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    step = tl.arange(0, BLOCK).to(tl.int64)
    edge = tl.full((), margin, COMPUTE)
    bad = _bad_rows(
        target,
        target_strides,
        row,
        inside,
        classes,
        labels,
        claim,
        words,
        record,
        SETS,
        ROWS,
        BLOCK,
    )
    share = tl.full((ROWS,), 1.0, tl.float64) / classes
    if weight is not None:
        has, y = _label(target, target_strides, row, 0, inside, classes)
        share *= tl.load(weight + y, mask=has, other=0.0).to(tl.float64)
    scale = share / denominator
    if incoming is not None:
        arrived = tl.load(incoming + row * incoming_stride, mask=inside, other=0.0)
        scale *= arrived.to(tl.float64)
    value = tl.zeros((ROWS,), tl.float64)
    for start in range(0, classes, BLOCK):
        f = start + step
        values, known = _block(x, x_strides, row, inside, f, classes, COMPUTE)
        marked = _marked(target, target_strides, row, inside, f, classes, labels, ROWS, BLOCK)
        g = tl.zeros((ROWS, BLOCK), COMPUTE)
        k = 0
        alive = inside
        while (k < labels) & _any(alive):
            alive, y = _label(target, target_strides, row, k, alive, classes)
            at = x + row * x_strides[0] + y * x_strides[1]
            own = tl.load(at, mask=alive, other=0.0).to(COMPUTE)
            counts = known & ~marked & alive[:, None]
            gap, slope = _passed(values, own, counts, edge, SQUARED)
            value += tl.sum(gap.to(tl.float64), 1)
            if grad is not None:
                here = alive[:, None] & (f[None, :] == y[:, None])
                g += slope
                if SINGLE:
                    g -= tl.where(here, tl.sum(slope, 1)[:, None], 0.0)
                elif tl.max(tl.max(here.to(tl.int32), 1), 0) > 0:
                    whole = _whole_slope(
                        x, x_strides, target, target_strides, row, inside, alive, own, edge, classes,
                        labels, SQUARED, COMPUTE, ROWS, BLOCK,
                    )  # fmt: skip
                    g -= tl.where(here, whole[:, None], 0.0)
            k += 1
        if grad is not None:
            at = grad + (row * grad_strides[0])[:, None] + (f * grad_strides[1])[None, :]
            scaled = g * scale.to(COMPUTE)[:, None]
            tl.store(at, scaled.to(grad.dtype.element_ty), mask=known)
    value = tl.where(bad, float("nan"), value * share)
    value = tl.where(inside, value, 0.0)
    if loss is not None:
        tl.store(loss + row, value.to(loss.dtype.element_ty), mask=inside)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(value))
    if result is not None:
        tl.store(result, (tl.sum(value) / denominator).to(result.dtype.element_ty))
