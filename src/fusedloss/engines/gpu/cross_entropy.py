"""Cross entropy through Triton; a program takes some positions of one n."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..plan import Slot, flat
from . import m
from .focal import focused
from .gradients_of_rows import at_classes, slopes_of, soft_part, write, write_blocks
from .grid import Grid
from .labels import labels
from .launch import ceil_div, finish, launch, reporting, scratch
from .nll import divisor_of
from .pointwise import TRITON
from .softmax import (
    exp_to,
    gather,
    gather_greatest,
    grouped,
    joined,
    joined_greatest,
)
from .tiles import Tile, groups, tile


def run(grid: Grid, kernel: Any, held: int) -> Slot:
    """Gives the divisor of a mean over weights, for the gradients to be scaled anew."""
    call, x, device = grid.call, grid.x, grid.x.device
    total, compute = grid.total, grid.compute()
    soft = call.smoothing / max(grid.c, 1)
    x_strides = grid.classes(x)
    beside = None if x_strides[1] == 1 or grid.d == 1 else grid.d
    each = tile(grid.c, beside, held, compute.itemsize, x.element_size())
    across = ceil_div(grid.d, each.rows)
    programs = grid.n * across
    mean = call.reduction == "mean"
    weighted = not call.probabilities and call.denominator is None
    divisor = grid.rest[0] if grid.rest else None
    if mean and weighted and divisor is None and programs > 1:
        divisor = divisor_of(grid)
    partial = None
    if total is not None and programs > 1:
        partial = scratch(programs, device)
    losses = None if grid.losses is None else flat(grid.losses, 1)
    grad, grad_target = (None if g is None else flat(g, 2) for g in grid.grads)
    denominator = call.over(grid.positions)
    launch(
        kernel,
        programs,
        device,
        x=x,
        target=grid.target,
        weight=grid.weight,
        incoming=grid.incoming,
        loss=losses,
        grad=grad,
        grad_target=grad_target,
        partial=partial,
        result=total if partial is None else None,
        divisor=divisor,
        classes=grid.c,
        across=across,
        positions=grid.d,
        x_strides=x_strides,
        target_strides=(grid.classes if call.probabilities else grid.values)(grid.target),
        incoming_strides=grid.values(grid.incoming),
        loss_strides=grid.values(losses),
        grad_strides=grid.classes(grad),
        grad_target_strides=grid.classes(grad_target),
        ignore_index=call.ignore_index,
        hard=1.0 - call.smoothing,
        soft=soft,
        gamma=call.gamma,
        denominator=denominator,
        **reporting(device, None if grid.stored else grid.record()),
        PROBABILITIES=call.probabilities,
        SMOOTH=soft > 0,
        FOCAL=call.gamma != 0,
        WEIGHTS_MEAN=mean and weighted,
        SINGLE=each.single,
        STORED=grid.stored,
        COMPUTE=TRITON[compute],
        INDEX=_index_type(grid, each, grad, grad_target),
        ROWS=each.rows,
        BLOCK=each.block,
        GROUPS=groups(each, x, beside is None),
        num_warps=each.warps,
    )
    if partial is not None and total is not None:
        finish(partial, total, denominator if divisor is None else divisor)
    return divisor


def _index_type(grid: Grid, each: Tile, *grads: Slot) -> tl.dtype:
    """Of offsets within what a program takes."""
    tensors = (grid.x, grid.target if grid.target.shape == grid.x.shape else None, *grads)
    for _, c, d in map(grid.classes, tensors):
        if (grid.c + each.block) * abs(c) + each.rows * abs(d) >= 2**31:
            return tl.int64
    return tl.int32


@triton.jit
def _add(
    t, is_own, part, sums,
    SOFT: tl.constexpr, PROBABILITIES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds classes to the sums."""
    top, origin, others, mass, dot, own, rest = sums
    if PROBABILITIES:
        top, origin, others, mass, dot, own, rest = gather_greatest(
            t, part, top, origin, others, mass, dot, own, rest, EXACT
        )
    else:
        top, origin, others, mass, dot = gather(
            t, is_own, part, top, origin, others, mass, dot, SOFT, EXACT
        )
    return top, origin, others, mass, dot, own, rest


@triton.jit
def _gather_blocks(
    x, x_strides, soft, classes, where, y, counted, own_x, sums,
    PROBABILITIES: tl.constexpr, SOFT: tl.constexpr, EXACT: tl.constexpr, APART: tl.constexpr,
    COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The sums of rows that come in blocks: one is on its way while the one before is summed."""
    n, first, lane, _ = where
    top, origin, others, mass, dot, own, rest = sums
    step = tl.arange(0, BLOCK)
    label = y.to(tl.int32)[:, None]
    mine = tl.sum(y, 0)
    if APART and not SOFT:
        top = tl.broadcast_to(own_x[:, None], top.shape)
        origin = tl.where(top == -float("inf"), 0.0, top)
    known = counted[:, None] & (step < classes)[None, :]
    at = at_classes(x, x_strides, n, first, lane, step, INDEX)
    coming = tl.load(at, mask=known, other=-float("inf"), eviction_policy="evict_last")
    for start in range(0, classes, BLOCK):
        c = start + step
        t = coming
        known = counted[:, None] & (c + BLOCK < classes)[None, :]
        at = at_classes(x, x_strides, n, first, lane, c + BLOCK, INDEX)
        coming = tl.load(at, mask=known, other=-float("inf"), eviction_policy="evict_last")
        part = 0.0
        if SOFT:
            part = soft_part(soft, c, classes, where, PROBABILITIES, COMPUTE, INDEX)
        t = grouped(t.to(COMPUTE), ROWS, GROUPS)
        if SOFT:
            part = grouped(tl.broadcast_to(part, (ROWS, BLOCK)), ROWS, GROUPS)
        is_own = grouped(c[None, :] == label, ROWS, GROUPS)
        if APART and not SOFT:
            if (mine >= start) & (mine < start + BLOCK):
                t = tl.where(is_own, -float("inf"), t)
            is_own = False
        top, origin, others, mass, dot, own, rest = _add(
            t, is_own, part, (top, origin, others, mass, dot, own, rest), SOFT, PROBABILITIES, EXACT
        )
    if GROUPS > 1:
        if PROBABILITIES:
            top, origin, others, mass, dot, own, rest = joined_greatest(
                top, origin, others, mass, dot, own, rest, EXACT
            )
        else:
            top, origin, others, mass, dot = joined(top, origin, others, mass, dot, EXACT)
    return top, origin, others, mass, dot, own, rest


@triton.jit
def value_of(
    sums, y, own_x, hard_weight, counted, bad,
    PROBABILITIES: tl.constexpr, SOFT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The loss of each row; and what the gradient takes of it."""
    _, origin, others, mass, dot, own, _ = sums
    if not PROBABILITIES:
        own = tl.where(counted, exp_to(own_x, origin, EXACT), 0.0)
    total = others + own
    # Where the own class is the largest, log1p keeps the digits that 1 + others loses.
    if PROBABILITIES:
        certain = own == m.raised(own)
    else:
        certain = counted & (own_x - origin == 0.0)  # inf - inf is not
    down = m.lowered(total)
    log_total = tl.where(certain, m.log1p(others * down), m.log(total * down))
    own_loss = log_total + tl.where(certain, 0.0, origin - own_x)
    value = tl.where(y >= 0, hard_weight * own_loss, 0.0)
    if SOFT:
        value += mass * log_total - dot
    value = tl.where(bad, float("nan"), tl.where(counted, value, 0.0))
    return value, own, total, certain, down, log_total


@triton.jit
def own_class(
    x, x_strides, weight, target, target_strides, rows, classes, ignore_index, told,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The class of each row, -1 if it does not count; which are wrong; their weights and logits."""
    n, d, position, inside = rows
    claim, words, record = told
    y, bad = labels(
        target, target_strides, n, d, position, inside, classes, ignore_index, claim, words, record
    )
    counted = y >= 0
    own_weight = counted.to(COMPUTE)
    if weight is not None:
        own_weight = tl.load(weight + y, mask=counted, other=0.0)
    place = n * x_strides[0] + d * x_strides[2] + y * x_strides[1]
    own_x = tl.load(x + place, mask=counted, other=0.0).to(COMPUTE)
    return y, bad, counted, own_weight, own_x


@triton.jit
def arrived_at(incoming, strides, n, d, inside, COMPUTE: tl.constexpr):
    """Loaded early, and not at its use, where Triton 3.6 cannot compile the conversion of a half type."""
    arrived = tl.full(d.shape, 1.0, COMPUTE)
    if incoming is not None:
        place = incoming + n * strides[0] + d * strides[1]
        arrived = tl.load(place, mask=inside, other=0.0).to(COMPUTE)
    return arrived


@triton.jit
def _no_sums(ROWS: tl.constexpr, GROUPS: tl.constexpr, COMPUTE: tl.constexpr):
    """What is gathered of rows, or of their groups: what crosses threads waits for the end."""
    SHAPE: tl.constexpr = (ROWS, GROUPS) if GROUPS > 1 else (ROWS,)
    zero = tl.zeros(SHAPE, COMPUTE)
    return tl.full(SHAPE, -float("inf"), COMPUTE), zero, zero, zero, zero, zero, zero


@triton.jit
def reduce_rows(
    value, loss, partial, result, divisor, own_weight, denominator, at, inside, WEIGHTS_MEAN: tl.constexpr
):  # fmt: skip
    """Stores the losses and their sum; gives what that is divided by."""
    if loss is not None:
        tl.store(loss + at, value.to(loss.dtype.element_ty), mask=inside)
    by = tl.full((), denominator, tl.float64)
    if divisor is not None:
        by = tl.load(divisor)
    elif WEIGHTS_MEAN:
        by = tl.sum(own_weight.to(tl.float64))
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(value.to(tl.float64)))
    if result is not None:
        mean = tl.sum(value.to(tl.float64)) / by
        tl.store(result, mean.to(result.dtype.element_ty))
    return by


@triton.jit(do_not_specialize=["record", "ignore_index"])
def softmax_rows(
    x, target, weight, incoming, loss, grad, grad_target, partial, result, divisor,
    classes, across, positions,
    x_strides, target_strides, incoming_strides, loss_strides, grad_strides, grad_target_strides,
    ignore_index, hard: tl.float64, soft: tl.float64, gamma: tl.float64, denominator: tl.float64,
    claim, words, record,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, FOCAL: tl.constexpr, WEIGHTS_MEAN: tl.constexpr,
    SINGLE: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    SOFT: tl.constexpr = PROBABILITIES or SMOOTH
    # Results of half types have no use for the digits that the GPU's own exp loses.
    EXACT: tl.constexpr = x.dtype.element_ty.primitive_bitwidth >= 32
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    program = tl.program_id(0).to(tl.int64)
    n, first, lane = program // across, program % across * ROWS, tl.arange(0, ROWS)
    d = first + lane
    inside = d < positions
    where = (n, first, lane, inside)
    soft_terms = (
        target, weight, target_strides, tl.full((), hard, COMPUTE), tl.full((), soft, COMPUTE)
    )  # fmt: skip
    arrived = arrived_at(incoming, incoming_strides, n, d, inside, COMPUTE)
    y, bad, counted = tl.full((ROWS,), -1, tl.int64), inside & False, inside
    own_weight, own_x = tl.zeros((ROWS,), COMPUTE), tl.zeros((ROWS,), COMPUTE)
    if not PROBABILITIES:
        y, bad, counted, own_weight, own_x = own_class(
            x, x_strides, weight, target, target_strides, (n, d, n * positions + d, inside), classes,
            ignore_index, (claim, words, record), COMPUTE,
        )  # fmt: skip
    # The own class of a long row is treated apart, and spares all others a comparison.
    APART: tl.constexpr = GROUPS > 1 and ROWS == 1 and not PROBABILITIES
    sums = _no_sums(ROWS, GROUPS, COMPUTE)
    # Of a row that does not count nothing is read: it may hold NaN.
    if SINGLE:
        c = tl.arange(0, BLOCK)
        known = inside[:, None] & (c < classes)[None, :]
        at = at_classes(x, x_strides, n, first, lane, c, INDEX)
        t = tl.load(at, mask=known & counted[:, None], other=-float("inf")).to(COMPUTE)
        is_own = c[None, :] == y.to(tl.int32)[:, None]
        part = 0.0
        if SOFT:
            part = soft_part(soft_terms, c, classes, where, PROBABILITIES, COMPUTE, INDEX)
        sums = _add(t, is_own, part, sums, SOFT, PROBABILITIES, EXACT)
    else:
        sums = _gather_blocks(
            x, x_strides, soft_terms, classes, where, y, counted, own_x, sums, PROBABILITIES, SOFT, EXACT,
            APART, COMPUTE, INDEX, ROWS, BLOCK, GROUPS,
        )  # fmt: skip
    value, own, total, certain, down, log_total = value_of(
        sums, y, own_x, own_weight * soft_terms[3], counted, bad, PROBABILITIES, SOFT, EXACT
    )
    seen = own_weight
    if FOCAL:
        value, seen = focused(
            value, sums, own, total, certain, own_x, log_total, gamma, own_weight, counted
        )
    place = n * loss_strides[0] + d * loss_strides[1]
    by = reduce_rows(
        value, loss, partial, result, divisor, own_weight, denominator, place, inside, WEIGHTS_MEAN
    )
    if (grad is not None) | (grad_target is not None):
        g = tl.where(counted, (1.0 / by).to(COMPUTE), 0.0) * arrived
        slopes = slopes_of(
            g, sums, own, total, certain, down, seen, soft_terms[3], soft_terms[4], counted, PROBABILITIES
        )  # fmt: skip
        if SINGLE:
            write(
                grad, grad_target, grad_strides, grad_target_strides, t, is_own, part, c, known, weight,
                classes, where, slopes, log_total, soft_terms[3], counted, "", PROBABILITIES, SOFT, EXACT,
                INDEX,
            )  # fmt: skip
        else:
            write_blocks(
                x, grad, grad_target, x_strides, grad_strides, grad_target_strides, soft_terms, classes,
                where, y, counted, slopes, log_total, PROBABILITIES, SOFT, EXACT, APART, COMPUTE, INDEX,
                BLOCK,
            )  # fmt: skip
