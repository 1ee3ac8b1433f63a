"""Cross entropy through Triton; a program takes some positions of one n."""

from __future__ import annotations

import triton
import triton.language as tl

from ..plan import Slot, flat
from . import m
from .grid import Grid
from .labels import labels
from .launch import ceil_div, finish, launch, reporting, scratch
from .nll import divisor_of
from .pointwise import TRITON
from .softmax import (
    exp_each_to,
    exp_to,
    factor_of_raised,
    gather,
    gather_greatest,
    grouped,
    joined,
    joined_greatest,
)
from .tiles import Tile, groups, tile


def run(grid: Grid) -> Slot:
    """Gives the divisor of a mean over weights, for the gradients to be scaled anew."""
    call, x, device = grid.call, grid.x, grid.x.device
    total, compute = grid.total, grid.compute()
    soft = call.smoothing / max(grid.c, 1)
    held = 2 if call.probabilities or soft else 1
    x_strides = grid.classes(x)
    beside = None if x_strides[1] == 1 or grid.d == 1 else grid.d
    each = tile(grid.c, beside, held, compute.itemsize, x.element_size())
    across = ceil_div(grid.d, each.rows)
    programs = grid.n * across
    mean, weighted = call.reduction == "mean", not call.probabilities
    divisor = grid.rest[0] if grid.rest else None
    if mean and weighted and divisor is None and programs > 1:
        divisor = divisor_of(grid)
    partial = None
    if total is not None and programs > 1:
        partial = scratch(programs, device)
    losses = None if grid.losses is None else flat(grid.losses, 1)
    grad, grad_target = (None if g is None else flat(g, 2) for g in grid.grads)
    denominator = float(grid.positions) if mean else 1.0
    launch(
        _softmax_rows,
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
        denominator=denominator,
        **reporting(device, None if grid.stored else grid.record()),
        PROBABILITIES=call.probabilities,
        SMOOTH=soft > 0,
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
def _at(tensor, strides, n, first, lane, c, INDEX: tl.constexpr):
    """Pointers to the classes `c` of the positions first + lane."""
    base = tensor + n * strides[0] + first * strides[2]
    return base + (lane.to(INDEX) * strides[2])[:, None] + (c.to(INDEX) * strides[1])[None, :]


@triton.jit
def _soft_part(
    soft, c, classes, where, PROBABILITIES: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """(hard * q + soft) * w: b without its one-hot part; 0 beyond the classes."""
    target, weight, strides, hard, flat = soft
    n, first, lane, inside = where
    known = (c < classes)[None, :]
    if PROBABILITIES:
        at = _at(target, strides, n, first, lane, c, INDEX)
        q = tl.load(at, mask=inside[:, None] & known, other=0.0).to(COMPUTE)
        part = tl.where(known, hard * q + flat, 0.0)
    else:
        part = tl.where(known, flat, 0.0)
    if weight is not None:
        part = part * tl.load(weight + c, mask=c < classes, other=0.0)[None, :]
    return part


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
    at = _at(x, x_strides, n, first, lane, step, INDEX)
    coming = tl.load(at, mask=known, other=-float("inf"), eviction_policy="evict_last")
    for start in range(0, classes, BLOCK):
        c = start + step
        t = coming
        known = counted[:, None] & (c + BLOCK < classes)[None, :]
        at = _at(x, x_strides, n, first, lane, c + BLOCK, INDEX)
        coming = tl.load(at, mask=known, other=-float("inf"), eviction_policy="evict_last")
        part = 0.0
        if SOFT:
            part = _soft_part(soft, c, classes, where, PROBABILITIES, COMPUTE, INDEX)
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
def _value(
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
def _slope(
    t, is_own, part, slopes, counted, SOFT: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    origin, _, first, factor, g, own_slope = slopes
    slope = exp_each_to(t, origin[:, None], EXACT) * first[:, None] * factor[:, None]
    if SOFT:
        slope -= g[:, None] * part
        slope = tl.where(counted[:, None], slope, 0.0)  # a weight may be NaN
    return tl.where(is_own, own_slope[:, None], slope)


@triton.jit
def _target_slope(t, part, c, weight, classes, origin, log_total, scale):
    """scale * -log p, times the weight; 0 for a masked class without probability."""
    slope = scale[:, None] * ((origin[:, None] - t) + log_total[:, None])
    slope = tl.where((part == 0.0) & (t == -float("inf")), 0.0, slope)
    if weight is not None:
        slope = slope * tl.load(weight + c, mask=c < classes, other=0.0)[None, :]
    return slope


@triton.jit
def _write(
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
        slope = _slope(t, is_own, part, slopes, counted, SOFT, EXACT)
        at = _at(grad, strides, n, first, lane, c, INDEX)
        tl.store(at, slope.to(grad.dtype.element_ty), mask=known, cache_modifier=CACHE)
    if grad_target is not None:
        slope = _target_slope(t, part, c, weight, classes, origin, log_total, g * hard)
        at = _at(grad_target, target_strides, n, first, lane, c, INDEX)
        tl.store(at, slope.to(grad_target.dtype.element_ty), mask=known, cache_modifier=CACHE)


@triton.jit
def _write_blocks(
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
        at = _at(x, x_strides, n, first, lane, c, INDEX)
        read = known & counted[:, None]
        t = tl.load(at, mask=read, other=-float("inf"), eviction_policy="evict_first").to(COMPUTE)
        is_own = c[None, :] == label
        if APART:
            is_own = False
        part = 0.0
        if SOFT:
            part = _soft_part(soft, c, classes, where, PROBABILITIES, COMPUTE, INDEX)
        _write(
            grad, grad_target, strides, target_strides, t, is_own, part, c, known, weight, classes, where,
            slopes, log_total, hard, counted, ".cs", PROBABILITIES, SOFT, EXACT, INDEX,
        )  # fmt: skip
    if APART:
        tl.debug_barrier()
        at = grad + n * strides[0] + y * strides[1] + (first + lane) * strides[2]
        tl.store(at, own_slope.to(grad.dtype.element_ty), mask=counted)


@triton.jit
def _slopes(
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


@triton.jit
def _own_class(
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
def _no_sums(ROWS: tl.constexpr, GROUPS: tl.constexpr, COMPUTE: tl.constexpr):
    """What is gathered of rows, or of their groups: what crosses threads waits for the end."""
    SHAPE: tl.constexpr = (ROWS, GROUPS) if GROUPS > 1 else (ROWS,)
    zero = tl.zeros(SHAPE, COMPUTE)
    return tl.full(SHAPE, -float("inf"), COMPUTE), zero, zero, zero, zero, zero, zero


@triton.jit
def _reduce(
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
def _softmax_rows(
    x, target, weight, incoming, loss, grad, grad_target, partial, result, divisor,
    classes, across, positions,
    x_strides, target_strides, incoming_strides, loss_strides, grad_strides, grad_target_strides,
    ignore_index, hard: tl.float64, soft: tl.float64, denominator: tl.float64, claim, words, record,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTS_MEAN: tl.constexpr,
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
    if incoming is not None:
        # Here and not at its use, where Triton 3.6 cannot compile the conversion of a half type.
        place = n * incoming_strides[0] + d * incoming_strides[1]
        arrived = tl.load(incoming + place, mask=inside, other=0.0).to(COMPUTE)
    y, bad, counted = tl.full((ROWS,), -1, tl.int64), inside & False, inside
    own_weight, own_x = tl.zeros((ROWS,), COMPUTE), tl.zeros((ROWS,), COMPUTE)
    if not PROBABILITIES:
        y, bad, counted, own_weight, own_x = _own_class(
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
        at = _at(x, x_strides, n, first, lane, c, INDEX)
        t = tl.load(at, mask=known & counted[:, None], other=-float("inf")).to(COMPUTE)
        is_own = c[None, :] == y.to(tl.int32)[:, None]
        part = 0.0
        if SOFT:
            part = _soft_part(soft_terms, c, classes, where, PROBABILITIES, COMPUTE, INDEX)
        sums = _add(t, is_own, part, sums, SOFT, PROBABILITIES, EXACT)
    else:
        sums = _gather_blocks(
            x, x_strides, soft_terms, classes, where, y, counted, own_x, sums, PROBABILITIES, SOFT, EXACT,
            APART, COMPUTE, INDEX, ROWS, BLOCK, GROUPS,
        )  # fmt: skip
    value, own, total, certain, down, log_total = _value(
        sums, y, own_x, own_weight * soft_terms[3], counted, bad, PROBABILITIES, SOFT, EXACT
    )
    place = n * loss_strides[0] + d * loss_strides[1]
    by = _reduce(
        value, loss, partial, result, divisor, own_weight, denominator, place, inside, WEIGHTS_MEAN
    )
    if (grad is not None) | (grad_target is not None):
        g = tl.where(counted, (1.0 / by).to(COMPUTE), 0.0)
        if incoming is not None:
            g *= arrived
        slopes = _slopes(
            g, sums, own, total, certain, down, own_weight, soft_terms[3], soft_terms[4], counted, PROBABILITIES
        )  # fmt: skip
        if SINGLE:
            _write(
                grad, grad_target, grad_strides, grad_target_strides, t, is_own, part, c, known, weight,
                classes, where, slopes, log_total, soft_terms[3], counted, "", PROBABILITIES, SOFT, EXACT,
                INDEX,
            )  # fmt: skip
        else:
            _write_blocks(
                x, grad, grad_target, x_strides, grad_strides, grad_target_strides, soft_terms, classes,
                where, y, counted, slopes, log_total, PROBABILITIES, SOFT, EXACT, APART, COMPUTE, INDEX,
                BLOCK,
            )  # fmt: skip
