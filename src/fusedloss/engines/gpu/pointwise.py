"""Pointwise losses through Triton: one kernel for all formulas."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import errors, reduce
from ...kinds.formula import Pointwise
from ...kinds.names import NUMBERS, OPERANDS
from ..plan import PointwisePlan, Slot
from . import flags
from .engine import GpuEngine
from .launch import MOST_PROGRAMS, ceil_div, finish, launch, reporting, scratch
from .layout import merged
from .rebind import rebound

BLOCK = 1024
ONE_PROGRAM = 4 * BLOCK  # as many elements or fewer are summed by the program that computes them
LOSS = OPERANDS + 2  # the first slot that is written to
# The names of the kernel's arguments.
SLOTS = (
    *(f"operand{k}" for k in range(OPERANDS)),
    *("weight", "incoming", "loss"),
    *(f"grad{k}" for k in range(OPERANDS)),
)
PARAMS = tuple(f"number{k}" for k in range(NUMBERS))
MOST_DIMS = 4  # more, after merging what can be merged, are copied first

TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class Outside:
    """An element outside of a formula's domain."""

    formula: Pointwise
    shape: torch.Size

    def fail(self, position: int, first: int, second: int) -> NoReturn:
        assert self.formula.refuse is not None
        x, t = struct.unpack("=2d", struct.pack("=2q", first, second))
        self.formula.refuse(errors.position(position, self.shape), x, t)


class PointwiseEngine(GpuEngine[PointwisePlan]):
    plan = PointwisePlan

    def launch(self, plan: PointwisePlan) -> None:
        call, shape = plan.call, plan.shape
        *operands, weight = plan.tensors
        formula = rebound(call.formula)
        present = [o for o in operands if o is not None]
        device, numel = present[0].device, shape.numel()
        absent = (None,) * (OPERANDS - len(operands))
        stored, total = plan.stored, plan.total
        arrived = None if stored else plan.incoming
        slots: list[Slot] = [*operands, *absent, weight, arrived, plan.losses, *plan.grads]
        slots += [None] * (OPERANDS - len(plan.grads))
        slots, sizes, strides = _laid_out(slots, shape)
        blocks = ceil_div(numel, BLOCK)
        programs = 1 if numel <= ONE_PROGRAM else min(blocks, MOST_PROGRAMS)
        partial = None
        if total is not None and programs > 1:
            partial = scratch(programs, device)
        denominator: float | Tensor = 1.0
        if call.reduction == "mean":
            divisor = call.divisor(plan.tensors)
            denominator = float(numel) if divisor is None else divisor
        held = isinstance(denominator, Tensor)
        record = None if formula.domain is None else Outside(call.formula, shape)
        arguments: dict[str, Any] = dict(zip(SLOTS, slots, strict=True))
        arguments |= dict.fromkeys(PARAMS, 0.0) | dict(zip(PARAMS, call.params, strict=False))
        if stored:
            arguments["incoming"] = plan.incoming
        launch(
            _kernel,
            programs,
            device,
            **arguments,
            partial=partial,
            result=total if partial is None else None,
            count=numel,
            blocks=blocks,
            divisor=denominator if held else None,
            denominator=1.0 if isinstance(denominator, Tensor) else float(denominator),
            **reporting(device, record),
            sizes=tuple(sizes),
            strides=tuple(strides),
            VALUE=formula.value,
            GRAD=formula.grad,
            DOMAIN=formula.domain,
            TOLD=call.formula.told,
            COMPUTE=TRITON[reduce.wide(*present)],
            INDEX=_index_type(sizes, strides),
            STORED=stored,
            BLOCK=BLOCK,
            num_warps=4,
        )
        if partial is not None and total is not None:
            finish(partial, total, denominator)


def _laid_out(
    slots: list[Slot], shape: torch.Size
) -> tuple[list[Slot], list[int], list[tuple[int, ...]]]:
    """Sizes and strides for the kernel: none where all slots are dense. Copies what needs too many."""
    if all(t is None or (t.shape == shape and t.is_contiguous()) for t in slots):
        return slots, [], [()] * len(slots)
    spread = [None if t is None else t.expand(shape) for t in slots]
    sizes, strides = merged(shape, spread)
    if len(sizes) > MOST_DIMS:
        # What is written to has the layout of an input, or is dense.
        spread = [t if t is None or k >= LOSS else t.contiguous() for k, t in enumerate(spread)]
        sizes, strides = merged(shape, spread)
    return spread, sizes, strides


def _index_type(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tl.dtype:
    """Of the position of an element, and of offsets into strided tensors."""
    reach = (sum(abs(n * s) for n, s in zip(sizes, row, strict=False)) for row in strides)
    farthest = max(math.prod(sizes) + BLOCK, *reach)
    return tl.int64 if farthest >= 2**31 else tl.int32


@triton.jit
def _offsets(index, sizes, strides):
    """Where the elements lie, of a tensor with these strides."""
    rest = index
    offset = tl.zeros_like(index)
    for d in tl.static_range(len(sizes) - 1, -1, -1):
        if d == 0:
            offset += rest * strides[d]
        else:
            offset += (rest % sizes[d]) * strides[d]
            rest = rest // sizes[d]
    return offset


@triton.jit
def _pointer(tensor, start, lane, sizes, strides, INDEX: tl.constexpr):
    if len(strides) == 0:
        return tensor + start + lane
    else:  # Triton compiles what follows a return
        return tensor + _offsets(start.to(INDEX) + lane.to(INDEX), sizes, strides)


@triton.jit
def _load(
    tensor, start, lane, sizes, strides, inside, other, COMPUTE: tl.constexpr, INDEX: tl.constexpr
):
    at = _pointer(tensor, start, lane, sizes, strides, INDEX)
    return tl.load(at, mask=inside, other=other).to(COMPUTE)


@triton.jit
def _operand(
    tensor, start, lane, sizes, strides, inside, first, COMPUTE: tl.constexpr, INDEX: tl.constexpr
):
    """What a formula does not take repeats the first operand."""
    if tensor is not None:
        first = _load(tensor, start, lane, sizes, strides, inside, 0.5, COMPUTE, INDEX)
    return first


@triton.jit
def _store(tensor, value, start, lane, sizes, strides, inside, INDEX: tl.constexpr):
    at = _pointer(tensor, start, lane, sizes, strides, INDEX)
    tl.store(at, value.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _tell_outside(
    operands,
    outside,
    lane,
    sizes,
    strides,
    claim,
    words,
    record,
    TOLD: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the first element outside of the domain; `outside` holds the block of each lane's first, or -1."""
    far = tl.full((BLOCK,), 0x7FFFFFFFFFFFFFFF, tl.int64)
    where = tl.min(tl.where(outside < 0, far, outside.to(tl.int64) * BLOCK + lane))
    if where != 0x7FFFFFFFFFFFFFFF:
        none = tl.zeros_like(where)
        x = _pointer(operands[TOLD[0]], where, none, sizes, strides[TOLD[0]], INDEX)
        t = _pointer(operands[TOLD[1]], where, none, sizes, strides[TOLD[1]], INDEX)
        first, second = tl.load(x).to(tl.float64), tl.load(t).to(tl.float64)
        bits = first.to(tl.int64, bitcast=True), second.to(tl.int64, bitcast=True)
        flags.report(claim, words, record, where, bits[0], bits[1])


# fmt: off
@triton.jit(do_not_specialize=["record"])
def _kernel(
    operand0, operand1, operand2, operand3, weight, incoming, loss, grad0, grad1, grad2, grad3,
    partial, result, count, blocks, divisor, denominator: tl.float64,
    number0: tl.float64, number1: tl.float64, number2: tl.float64, number3: tl.float64,
    claim, words, record, sizes, strides,
    VALUE: tl.constexpr, GRAD: tl.constexpr, DOMAIN: tl.constexpr, TOLD: tl.constexpr,
    COMPUTE: tl.constexpr, INDEX: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    lane = tl.arange(0, BLOCK)
    by = tl.full((), denominator, tl.float64)
    if divisor is not None:
        by = tl.load(divisor).to(tl.float64)
    scale = tl.where(by == 0.0, float("nan"), 1.0 / by).to(COMPUTE)
    p = tl.full((), number0, COMPUTE)
    q = tl.full((), number1, COMPUTE)
    r = tl.full((), number2, COMPUTE)
    s = tl.full((), number3, COMPUTE)
    end = blocks
    if STORED:
        arrived = tl.load(incoming).to(COMPUTE)
        end = tl.where(arrived == 1.0, 0, blocks)
        scale *= arrived
    total = tl.zeros((BLOCK,), tl.float64)
    if DOMAIN is not None:
        outside = tl.full((BLOCK,), -1, tl.int32)
    for block in range(tl.program_id(0), end, tl.num_programs(0)):
        start = tl.full((), block, tl.int64) * BLOCK
        inside = lane < count - start
        a = _load(operand0, start, lane, sizes, strides[0], inside, 0.5, COMPUTE, INDEX)
        b = _load(operand1, start, lane, sizes, strides[1], inside, 0.5, COMPUTE, INDEX)
        c = _operand(operand2, start, lane, sizes, strides[2], inside, a, COMPUTE, INDEX)
        d = _operand(operand3, start, lane, sizes, strides[3], inside, a, COMPUTE, INDEX)
        factor = tl.full((BLOCK,), 1.0, COMPUTE)
        if weight is not None:
            factor = _load(weight, start, lane, sizes, strides[4], inside, 0.0, COMPUTE, INDEX)
        if DOMAIN is not None:
            lies = DOMAIN(a, b, c, d, p, q, r, s)
            outside = tl.where(lies | (outside >= 0), outside, block)
            a = tl.where(lies, a, float("nan"))
        if (loss is not None) | (partial is not None) | (result is not None):
            value = VALUE(a, b, c, d, p, q, r, s) * factor
            if loss is not None:
                _store(loss, value, start, lane, sizes, strides[6], inside, INDEX)
            total += tl.where(inside, value, 0.0).to(tl.float64)
        if (grad0 is not None) | (grad1 is not None) | (grad2 is not None) | (grad3 is not None):
            slopes = GRAD(a, b, c, d, p, q, r, s)
            factor *= scale
            if (incoming is not None) and not STORED:
                factor *= _load(
                    incoming, start, lane, sizes, strides[5], inside, 0.0, COMPUTE, INDEX
                )
            if grad0 is not None:
                _store(grad0, slopes[0] * factor, start, lane, sizes, strides[7], inside, INDEX)
            if grad1 is not None:
                _store(grad1, slopes[1] * factor, start, lane, sizes, strides[8], inside, INDEX)
            if grad2 is not None:
                _store(grad2, slopes[2] * factor, start, lane, sizes, strides[9], inside, INDEX)
            if grad3 is not None:
                _store(grad3, slopes[3] * factor, start, lane, sizes, strides[10], inside, INDEX)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(total))
    if result is not None:
        tl.store(result, (tl.sum(total) / by).to(result.dtype.element_ty))
    if DOMAIN is not None:
        _tell_outside(
            (operand0, operand1, operand2, operand3), outside, lane, sizes, strides,
            claim, words, record, TOLD, INDEX, BLOCK
        )
