"""Cross entropy and negative log likelihood through Triton; the sums are those of `csrc/rows.h`.

A program takes some positions of one n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import errors
from ..plan import RowsPlan, Slot, class_strides, flat, value_strides
from . import flags, m
from .engine import GpuEngine
from .launch import ceil_div, finish, launch, power_of_two, reporting, scratch
from .pointwise import TRITON

POSITIONS = 1024  # of a program that reads one value a row
WIDEST = 8192  # classes that a program holds in registers


@dataclass(frozen=True)
class OutOfRange:
    """A class index that is out of range."""

    function: str
    shape: torch.Size
    classes: int
    ignore_index: int
    unsigned: bool

    def fail(self, position: int, first: int, second: int) -> NoReturn:
        value = first % 2**64 if self.unsigned else first
        errors.index_out_of_range(
            self.function, self.shape, position, value, self.classes, self.ignore_index
        )


class Tile(NamedTuple):
    rows: int
    block: int
    single: bool  # whether the block holds all classes
    warps: int


def tile(classes: int, across: int | None, held: int, itemsize: int, stored: int) -> Tile:
    """How much a program takes, with `held` values of the computed type for each logit in registers.

    `across` is the number of positions that lie side by side, None where the classes do; `stored` are
    the bytes of a logit, `itemsize` those of the type computed in.
    """
    per_class = held * max(itemsize // 4, 1)
    block = power_of_two(classes)
    if across is None:
        single = block <= WIDEST // per_class
        if not single:
            # A longer row is for more warps, so that what is read twice stays in the cache.
            block = min(max(block * stored // 16, 4096), 16384)
            if per_class > 1:
                block = 8192 // max(stored, per_class)
            return Tile(1, block, False, max(block // 512, 8))
        rows = max(1, 2048 // block)
        return Tile(rows, block, single, min(max(rows * block // 512 * held, 4), 32))
    # A thread has 16 bytes of positions, and all classes of them: no sum crosses threads.
    rows = min(power_of_two(across), 2048 // stored)
    single = rows * block <= 4096 // per_class
    block = block if single else max(4 // per_class, 2)
    return Tile(rows, block, single, 4)


def groups(each: Tile, x: Tensor, side_by_side: bool) -> int:
    """How many sums a program keeps of a row that comes in blocks: one for each load of 16 bytes."""
    return 1 if each.single or not side_by_side else max(each.block * x.element_size() // 16, 1)


class Grid(RowsPlan):
    """Tensors as (n, c, d), and (N, C, 1) as (1, C, N), for the programs to be full."""

    def spread(self) -> None:
        super().spread()
        n, self.c, d = self.sizes()
        self.alone = self.x.dim() == 3 and d == 1
        self.n, self.d = (1, n) if self.alone else (n, d)

    @property
    def positions(self) -> int:
        return self.n * self.d

    def gradient(self, tensor: Tensor) -> Tensor:
        # The kernel of nll writes the target's entry alone.
        memory = super().gradient(tensor)
        return memory.zero_() if self.call.loss == "nll_loss" else memory

    def classes(self, tensor: Slot) -> tuple[int, int, int]:
        """The strides of a tensor with a class dimension."""
        if tensor is None:
            return 0, 0, 0
        n, c, d = class_strides(flat(tensor, 2))
        return (0, c, n) if self.alone else (n, c, d)

    def values(self, tensor: Slot) -> tuple[int, int]:
        """The same of a tensor with one value a row, or one for all of them."""
        if tensor is None:
            return 0, 0
        n, _, d = value_strides(tensor)
        return (0, n) if self.alone and tensor.dim() == 2 else (n, d)

    def record(self) -> OutOfRange | None:
        call, target = self.call, self.tensors[1]
        if call.probabilities or target is None:
            return None
        unsigned = target.dtype is torch.uint64
        return OutOfRange(call.loss, target.shape, self.c, call.ignore_index, unsigned)


class RowsEngine(GpuEngine[Grid]):
    plan = Grid

    def launch(self, plan: Grid) -> None:
        if plan.call.loss == "nll_loss":
            _nll(plan)
        else:
            plan.grads.append(_cross_entropy(plan))


def _divisor(grid: Grid) -> Tensor:
    """The sum of the weights of the counted rows."""
    programs = ceil_div(grid.positions, POSITIONS)
    sums = scratch(programs, grid.x.device)
    _read(grid, programs, divisors=sums)
    if programs == 1:
        return sums
    divisor = scratch(1, grid.x.device)
    finish(sums, divisor, 1.0)
    return divisor


def _nll(grid: Grid) -> None:
    programs, device = ceil_div(grid.positions, POSITIONS), grid.x.device
    mean, losses, total = grid.call.reduction == "mean", grid.losses, grid.total
    arguments: dict[str, Any] = {"record": grid.record(), "x": grid.x}
    if grid.incoming is not None:
        divisor = _divisor(grid) if mean and programs > 1 else None
        arguments |= {"incoming": grid.incoming, "grad": grid.grads[0], "divisor": divisor}
        _read(grid, programs, **arguments)
    elif losses is not None:
        _read(grid, programs, **arguments, loss=flat(losses, 1))
    elif programs == 1:
        _read(grid, programs, **arguments, result=total)
    else:
        partial = scratch(programs, device)
        divisors = scratch(programs, device) if mean else None
        _read(grid, programs, **arguments, partial=partial, divisors=divisors)
        assert total is not None
        finish(partial, total, 1.0 if divisors is None else divisors)


def _read(
    grid: Grid,
    programs: int,
    record: OutOfRange | None = None,
    x: Slot = None,
    incoming: Slot = None,
    loss: Slot = None,
    grad: Slot = None,
    partial: Slot = None,
    divisors: Slot = None,
    divisor: Slot = None,
    result: Slot = None,
) -> None:
    device = grid.x.device
    launch(
        _one_value,
        programs,
        device,
        x=x,
        target=grid.target,
        weight=grid.weight,
        incoming=incoming,
        loss=loss,
        grad=grad,
        partial=partial,
        divisors=divisors,
        divisor=divisor,
        result=result,
        positions=grid.positions,
        classes=grid.c,
        across=grid.d,
        x_strides=grid.classes(x),
        target_strides=grid.values(grid.target),
        incoming_strides=grid.values(incoming),
        loss_strides=grid.values(loss),
        grad_strides=grid.classes(grad),
        ignore_index=grid.call.ignore_index,
        **reporting(device, record),
        MEAN=grid.call.reduction == "mean",
        COMPUTE=TRITON[grid.compute()],
        BLOCK=POSITIONS,
        num_warps=4,
    )


@triton.jit
def labels(target, strides, n, d, position, inside, classes, ignore_index, claim, words, record):
    """Class indices, -1 where a row does not count; which of them are out of range."""
    y = tl.load(target + n * strides[0] + d * strides[1], mask=inside, other=0).to(tl.int64)
    ignored = y == ignore_index
    bad = inside & ~ignored & ((y < 0) | (y >= classes))
    if words is not None:
        far = tl.full(position.shape, 0x7FFFFFFFFFFFFFFF, tl.int64)
        first = tl.min(tl.where(bad, position, far))
        if first != 0x7FFFFFFFFFFFFFFF:
            value = tl.sum(tl.where(position == first, y, 0))
            flags.report(claim, words, record, first, value, value)
    return tl.where(inside & ~ignored & ~bad, y, -1), bad


@triton.jit(do_not_specialize=["record", "ignore_index"])
def _one_value(
    x,
    target,
    weight,
    incoming,
    loss,
    grad,
    partial,
    divisors,
    divisor,
    result,
    positions,
    classes,
    across,
    x_strides,
    target_strides,
    incoming_strides,
    loss_strides,
    grad_strides,
    ignore_index,
    claim,
    words,
    record,
    MEAN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Negative log likelihood, or the weights alone; the gradient's other entries are zero already."""
    lane = tl.arange(0, BLOCK)
    position = tl.program_id(0).to(tl.int64) * BLOCK + lane
    inside = position < positions
    n = position // across
    d = position % across
    y, bad = labels(
        target, target_strides, n, d, position, inside, classes, ignore_index, claim, words, record
    )
    counted = y >= 0
    own = counted.to(COMPUTE)
    if weight is not None:
        own = tl.load(weight + y, mask=counted, other=0.0)
    by = tl.sum(own.to(tl.float64))
    if divisors is not None:
        tl.store(divisors + tl.program_id(0), by)
    if divisor is not None:
        by = tl.load(divisor)
    if grad is not None:
        g = -own * tl.load(
            incoming + n * incoming_strides[0] + d * incoming_strides[1], mask=counted, other=0.0
        ).to(COMPUTE)
        if MEAN:
            g = (g.to(tl.float64) / by).to(COMPUTE)
        at = n * grad_strides[0] + y * grad_strides[1] + d * grad_strides[2]
        tl.store(grad + at, g.to(grad.dtype.element_ty), mask=counted)
    elif x is not None:
        at = n * x_strides[0] + y * x_strides[1] + d * x_strides[2]
        value = -own * tl.load(x + at, mask=counted, other=0.0).to(COMPUTE)
        value = tl.where(bad, float("nan"), value)
        if loss is not None:
            at = n * loss_strides[0] + d * loss_strides[1]
            tl.store(loss + at, value.to(loss.dtype.element_ty), mask=inside)
        total = tl.sum(value.to(tl.float64))
        if partial is not None:
            tl.store(partial + tl.program_id(0), total)
        if result is not None:
            if MEAN:
                total = total / by
            tl.store(result, total.to(result.dtype.element_ty))


def _cross_entropy(grid: Grid) -> Slot:
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
        divisor = _divisor(grid)
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
    target,
    weight,
    strides,
    n,
    first,
    lane,
    inside,
    c,
    classes,
    hard,
    soft,
    PROBABILITIES: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """(hard * q + soft) * w: b without its one-hot part; 0 beyond the classes."""
    known = (c < classes)[None, :]
    if PROBABILITIES:
        at = _at(target, strides, n, first, lane, c, INDEX)
        q = tl.load(at, mask=inside[:, None] & known, other=0.0).to(COMPUTE)
        part = tl.where(known, hard * q + soft, 0.0)
    else:
        part = tl.where(known, soft, 0.0)
    if weight is not None:
        part = part * tl.load(weight + c, mask=c < classes, other=0.0)[None, :]
    return part


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
def _gather_greatest(t, part, top, origin, others, mass, dot, own, rest, EXACT: tl.constexpr):
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
def _joined_greatest(top, origin, others, mass, dot, own, rest, EXACT: tl.constexpr):
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
def _slope(
    t, is_own, part, origin, first, factor, g, own_slope, counted, SOFT: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
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


@triton.jit(do_not_specialize=["record", "ignore_index"])
def _softmax_rows(
    x,
    target,
    weight,
    incoming,
    loss,
    grad,
    grad_target,
    partial,
    result,
    divisor,
    classes,
    across,
    positions,
    x_strides,
    target_strides,
    incoming_strides,
    loss_strides,
    grad_strides,
    grad_target_strides,
    ignore_index,
    hard: tl.float64,
    soft: tl.float64,
    denominator: tl.float64,
    claim,
    words,
    record,
    PROBABILITIES: tl.constexpr,
    SMOOTH: tl.constexpr,
    WEIGHTS_MEAN: tl.constexpr,
    SINGLE: tl.constexpr,
    STORED: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    SOFT: tl.constexpr = PROBABILITIES or SMOOTH
    # Results of half types have no use for the digits that the GPU's own exp loses.
    EXACT: tl.constexpr = x.dtype.element_ty.primitive_bitwidth >= 32
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    program = tl.program_id(0).to(tl.int64)
    n = program // across
    first = program % across * ROWS
    lane = tl.arange(0, ROWS)
    d = first + lane
    inside = d < positions
    hard_part = tl.full((), hard, COMPUTE)
    soft_part = tl.full((), soft, COMPUTE)

    if incoming is not None:
        # Here and not at its use, where Triton 3.6 cannot compile the conversion of a half type.
        place = n * incoming_strides[0] + d * incoming_strides[1]
        arrived = tl.load(incoming + place, mask=inside, other=0.0).to(COMPUTE)
    counted = inside
    own_weight = tl.zeros((ROWS,), COMPUTE)
    own_x = tl.zeros((ROWS,), COMPUTE)
    y = tl.full((ROWS,), -1, tl.int64)
    bad = inside & False
    if not PROBABILITIES:
        y, bad = labels(
            target,
            target_strides,
            n,
            d,
            n * positions + d,
            inside,
            classes,
            ignore_index,
            claim,
            words,
            record,
        )
        counted = y >= 0
        own_weight = counted.to(COMPUTE)
        if weight is not None:
            own_weight = tl.load(weight + y, mask=counted, other=0.0)
        place = n * x_strides[0] + d * x_strides[2] + y * x_strides[1]
        own_x = tl.load(x + place, mask=counted, other=0.0).to(COMPUTE)

    # What the pass over the classes gathers, relative to the greatest logit so far, of rows or of their groups:
    # what crosses threads waits for the end.
    SHAPE: tl.constexpr = (ROWS, GROUPS) if GROUPS > 1 else (ROWS,)
    top = tl.full(SHAPE, -float("inf"), COMPUTE)
    origin = tl.zeros(SHAPE, COMPUTE)
    others = tl.zeros(SHAPE, COMPUTE)
    mass = tl.zeros(SHAPE, COMPUTE)
    dot = tl.zeros(SHAPE, COMPUTE)
    own = tl.zeros(SHAPE, COMPUTE)
    rest = tl.zeros(SHAPE, COMPUTE)
    label = y.to(tl.int32)[:, None]
    # The own class of a long row is treated apart, and spares all others a comparison.
    APART: tl.constexpr = GROUPS > 1 and ROWS == 1 and not PROBABILITIES
    mine = tl.sum(y, 0)
    step = tl.arange(0, BLOCK)
    # Of a row that does not count nothing is read: it may hold NaN.
    if SINGLE:
        part = 0.0
        known = counted[:, None] & (step < classes)[None, :]
        is_own = step[None, :] == label
        at = _at(x, x_strides, n, first, lane, step, INDEX)
        t = tl.load(at, mask=known, other=-float("inf")).to(COMPUTE)
        if SOFT:
            part = _soft_part(
                target, weight, target_strides, n, first, lane, inside, step, classes, hard_part,
                soft_part, PROBABILITIES, COMPUTE, INDEX,
            )  # fmt: skip
        if PROBABILITIES:
            top, origin, others, mass, dot, own, rest = _gather_greatest(
                t, part, top, origin, others, mass, dot, own, rest, EXACT
            )
        else:
            top, origin, others, mass, dot = gather(
                t, is_own, part, top, origin, others, mass, dot, SOFT, EXACT
            )
    else:
        if APART and not SOFT:
            top = tl.broadcast_to(own_x[:, None], SHAPE)
            origin = tl.where(top == -float("inf"), 0.0, top)
        # A block is on its way while the one before is summed.
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
                part = _soft_part(
                    target, weight, target_strides, n, first, lane, inside, c, classes, hard_part,
                    soft_part, PROBABILITIES, COMPUTE, INDEX,
                )  # fmt: skip
            t = grouped(t.to(COMPUTE), ROWS, GROUPS)
            if SOFT:
                part = grouped(tl.broadcast_to(part, (ROWS, BLOCK)), ROWS, GROUPS)
            if PROBABILITIES:
                top, origin, others, mass, dot, own, rest = _gather_greatest(
                    t, part, top, origin, others, mass, dot, own, rest, EXACT
                )
            else:
                is_own = grouped(c[None, :] == label, ROWS, GROUPS)
                if APART and not SOFT:
                    if (mine >= start) & (mine < start + BLOCK):
                        t = tl.where(is_own, -float("inf"), t)
                    is_own = False
                top, origin, others, mass, dot = gather(
                    t, is_own, part, top, origin, others, mass, dot, SOFT, EXACT
                )
        if GROUPS > 1:
            if PROBABILITIES:
                top, origin, others, mass, dot, own, rest = _joined_greatest(
                    top, origin, others, mass, dot, own, rest, EXACT
                )
            else:
                top, origin, others, mass, dot = joined(top, origin, others, mass, dot, EXACT)

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
    hard_weight = own_weight * hard_part
    value = tl.where(y >= 0, hard_weight * own_loss, 0.0)
    if SOFT:
        value += mass * log_total - dot
    value = tl.where(bad, float("nan"), tl.where(counted, value, 0.0))
    if loss is not None:
        place = n * loss_strides[0] + d * loss_strides[1]
        tl.store(loss + place, value.to(loss.dtype.element_ty), mask=inside)

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

    if (grad is not None) | (grad_target is not None):
        g = tl.where(counted, (1.0 / by).to(COMPUTE), 0.0)
        if incoming is not None:
            g *= arrived
        first_factor, factor = factor_of_raised(g * (hard_weight + mass) / (total * down))
        # p - 1 as minus the others' share: exact where p is near 1.
        own_slope = g * ((mass * own - hard_weight * others) / total - soft_part * own_weight)
        greatest = origin
        if PROBABILITIES:
            # B p - b of the largest class as (B - b) - B (1 - p), for the same reason.
            own_slope = g * (rest - mass * others / total)
            greatest = tl.where(certain, origin, float("nan"))
        factor = tl.where(counted, factor, 0.0)
        own_slope = tl.where(counted, own_slope, 0.0)
        if SINGLE:
            known = inside[:, None] & (step < classes)[None, :]
            if grad is not None:
                if PROBABILITIES:
                    is_own = t == greatest[:, None]
                slope = _slope(
                    t, is_own, part, origin, first_factor, factor, g, own_slope, counted, SOFT, EXACT
                )  # fmt: skip
                at = _at(grad, grad_strides, n, first, lane, step, INDEX)
                tl.store(at, slope.to(grad.dtype.element_ty), mask=known)
            if grad_target is not None:
                slope = _target_slope(
                    t, part, step, weight, classes, origin, log_total, g * hard_part
                )
                at = _at(grad_target, grad_target_strides, n, first, lane, step, INDEX)
                tl.store(at, slope.to(grad_target.dtype.element_ty), mask=known)
        else:
            # Backwards: what was read last is still in the cache.
            blocks = tl.cdiv(classes, BLOCK)
            for back in range(blocks):
                c = (blocks - 1 - back) * BLOCK + step
                known = inside[:, None] & (c < classes)[None, :]
                at = _at(x, x_strides, n, first, lane, c, INDEX)
                t = tl.load(
                    at,
                    mask=known & counted[:, None],
                    other=-float("inf"),
                    eviction_policy="evict_first",
                )
                t = t.to(COMPUTE)
                is_own = c[None, :] == label
                if PROBABILITIES:
                    is_own = t == greatest[:, None]
                if APART:
                    is_own = False
                part = 0.0
                if SOFT:
                    part = _soft_part(
                        target, weight, target_strides, n, first, lane, inside, c, classes,
                        hard_part, soft_part, PROBABILITIES, COMPUTE, INDEX,
                    )  # fmt: skip
                if grad is not None:
                    slope = _slope(
                        t, is_own, part, origin, first_factor, factor, g, own_slope, counted, SOFT,
                        EXACT,
                    )  # fmt: skip
                    at = _at(grad, grad_strides, n, first, lane, c, INDEX)
                    tl.store(at, slope.to(grad.dtype.element_ty), mask=known, cache_modifier=".cs")
                if grad_target is not None:
                    slope = _target_slope(
                        t, part, c, weight, classes, origin, log_total, g * hard_part
                    )
                    at = _at(grad_target, grad_target_strides, n, first, lane, c, INDEX)
                    slope = slope.to(grad_target.dtype.element_ty)
                    tl.store(at, slope, mask=known, cache_modifier=".cs")
            if APART:
                tl.debug_barrier()
                at = grad + n * grad_strides[0] + y * grad_strides[1] + d * grad_strides[2]
                tl.store(at, own_slope.to(grad.dtype.element_ty), mask=counted)
