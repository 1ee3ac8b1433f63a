"""Negative log likelihood through Triton: one value a row."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..plan import Slot, flat
from .grid import Grid
from .labels import OutOfRange, labels
from .launch import ceil_div, finish, launch, reporting, scratch
from .pointwise import TRITON

POSITIONS = 1024  # of a program


def divisor_of(grid: Grid) -> Tensor:
    """The sum of the weights of the counted rows."""
    programs = ceil_div(grid.positions, POSITIONS)
    sums = scratch(programs, grid.x.device)
    _read(grid, programs, divisors=sums)
    if programs == 1:
        return sums
    divisor = scratch(1, grid.x.device)
    finish(sums, divisor, 1.0)
    return divisor


def run(grid: Grid) -> None:
    programs, device = ceil_div(grid.positions, POSITIONS), grid.x.device
    mean = grid.call.reduction == "mean" and grid.call.denominator is None
    losses, total = grid.losses, grid.total
    arguments: dict[str, Any] = {"record": grid.record(), "x": grid.x}
    if grid.incoming is not None:
        divisor = divisor_of(grid) if mean and programs > 1 else None
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
        finish(partial, total, grid.call.over(grid.positions) if divisors is None else divisors)


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
        denominator=grid.call.denominator or 1.0,
        **reporting(device, record),
        MEAN=grid.call.reduction == "mean",
        GIVEN=grid.call.denominator is not None,
        COMPUTE=TRITON[grid.compute()],
        BLOCK=POSITIONS,
        num_warps=4,
    )


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
    denominator: tl.float64,
    claim,
    words,
    record,
    MEAN: tl.constexpr,
    GIVEN: tl.constexpr,
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
    if GIVEN:
        by = tl.full((), denominator, tl.float64)
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
