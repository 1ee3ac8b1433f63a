"""Losses of overlaps through Triton: a pass for the sums of the classes, one for the gradient.

The places of a group, an image or all of a batch, are read in tiles. Programs share these, each adding up sums
of its own; where groups are small or many, a program takes whole ones through both passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import reduce
from ...kinds.dice import ACTIVATIONS, WEIGHTINGS
from ..plan import DicePlan, Slot
from .engine import GpuEngine
from .grid import Grid
from .labels import OutOfRange
from .launch import (
    MOST_PROGRAMS,
    ceil_div,
    finish,
    launch,
    ordered_sum,
    power_of_two,
    reporting,
    scratch,
)
from .nll import divisor_of
from .overlap import overlap, settled
from .places import add_sums, gradient
from .pointwise import TRITON
from .tiles import Tile, tile

SUMS = 1 << 17  # that all programs keep: a megabyte
FEWEST = 256  # programs that there may be of any number of classes
WHOLE_TILES, WHOLE_GROUPS = 4, 1024  # of a group, and groups, that need not be shared
ALL, OF_SUMS, OF_OVERLAP, OF_GRADIENT = range(4)  # what a launch does


class Share(NamedTuple):
    """How programs share the tiles of groups."""

    groups: int
    across: int  # tiles of an image
    tiles: int  # of a group
    whole: bool  # a program takes all of these
    each: int  # of these a program takes
    of_group: int  # programs

    @property
    def programs(self) -> int:
        return self.of_group if self.whole else self.groups * self.of_group

    @property
    def kept(self) -> int:
        """Slopes of as many groups are kept."""
        return self.of_group if self.whole else self.groups


def shared(groups: int, images: int, positions: int, classes: int, rows: int) -> Share:
    across = ceil_div(positions, rows)
    tiles = images * across
    whole = tiles <= WHOLE_TILES or groups >= WHOLE_GROUPS
    most = min(max(SUMS // ((6 if whole else 4) * classes), FEWEST), MOST_PROGRAMS)
    if whole:
        return Share(groups, across, tiles, True, tiles, min(groups, most))
    each = ceil_div(tiles, max(most // groups, 1))
    return Share(groups, across, tiles, False, each, ceil_div(tiles, each))


class Images:
    """Tensors as (n, c, d); of a batch of single places, these lie along d, for the tiles to be full."""

    def __init__(self, plan: DicePlan) -> None:
        self.n, self.c, self.d = plan.x.shape
        self.turned = plan.call.batch and self.d == 1
        if self.turned:
            self.n, self.d = 1, self.n

    def classes(self, tensor: Slot) -> tuple[int, int, int]:
        if tensor is None:
            return 0, 0, 0
        n, c, d = tensor.stride()
        return (0, c, n) if self.turned else (n, c, d)

    def values(self, tensor: Tensor) -> tuple[int, int]:
        n, d = tensor.stride()
        return (0, n) if self.turned else (n, d)


def _of_losses(plan: DicePlan, tensor: Slot) -> tuple[int, int]:
    """The strides by group and class of what has the shape of the losses."""
    if tensor is None:
        return 0, 0
    strides, by_class = tensor.stride(), plan.call.weighting == "none"
    both = (0, *strides) if by_class and len(strides) == 1 else (*strides, 0, 0)
    return both[0], both[1]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


class DiceEngine(GpuEngine[DicePlan]):
    plan = DicePlan

    def launch(self, plan: DicePlan) -> None:
        call, x, images = plan.call, plan.x, Images(plan)
        device, compute = x.device, reduce.wide(x)
        grad = None if plan.grads[0] is None else plan.of_images(plan.grads[0])
        strides = images.classes(x)
        beside = None if strides[1] == 1 or images.d == 1 else images.d
        held = tile(images.c, beside, 2, compute.itemsize, x.element_size())
        if beside and (call.by_rows or x.element_size() < 4):  # more values than registers
            held = held._replace(warps=2 * held.warps)
        groups, of_group = (1, images.n) if call.batch else (images.n, 1)
        share = shared(groups, of_group, images.d, images.c, held.rows)
        slopes = divisor = None
        if plan.rest:
            slopes, divisor = plan.rest
        elif call.by_rows and call.reduction == "mean":
            divisor = divisor_of(Grid(call.rows(call.dtype), plan.tensors, ()))
        if slopes is None and grad is not None:
            slopes = scratch(share.kept * 2 * images.c, device)
        count = share.programs if share.whole else groups + share.programs
        parts = None if plan.stored else scratch(count, device)
        given = self._arguments(plan, images, share, held, grad)
        given |= {"slopes": slopes, "divisor": divisor, "parts": parts}
        given["sums"] = None if plan.rest else scratch(share.programs * 4 * images.c, device)
        for phase, programs in _launches(plan, share):
            launch(_dice, programs, device, **given, PHASE=phase)
        if plan.total is not None and parts is not None:
            finish(parts, plan.total, 1.0)
        if plan.incoming is None and grad is not None and not share.whole:
            plan.grads += [slopes, divisor]  # a rescaling needs no sums

    def _arguments(
        self, plan: DicePlan, images: Images, share: Share, held: Tile, grad: Slot
    ) -> dict[str, Any]:
        call, x, target = plan.call, plan.x, _bytes(plan.target)
        each = call.weighting == "none"
        first = 0 if call.background else 1
        entries = share.groups * (images.c - first if each else 1)
        record = None
        if not (call.masks or plan.stored) and (given := plan.tensors[1]) is not None:
            unsigned = given.dtype is torch.uint64
            record = OutOfRange(call.loss, given.shape, images.c, call.ignore_index, unsigned)
        return {
            "x": x,
            "target": target,
            "weight": plan.weight,
            "incoming": plan.incoming,
            "loss": plan.losses,
            "grad": grad,
            "x_strides": images.classes(x),
            "target_strides": (images.classes if call.masks else images.values)(target),
            "grad_strides": images.classes(grad),
            "loss_strides": _of_losses(plan, plan.losses),
            "incoming_strides": _of_losses(plan, plan.incoming),
            "positions": images.d,
            "classes": images.c,
            "first_class": first,
            "groups": share.groups,
            "across": share.across,
            "tiles": share.tiles,
            "each": share.each,
            "of_group": share.of_group,
            "ignore_index": call.ignore_index,
            "alpha": call.alpha,
            "beta": call.beta,
            "smooth_nr": call.smooth_nr,
            "smooth_dr": call.smooth_dr,
            "scale": call.by_overlap / call.over(entries),
            "by_rows": call.by_rows,
            "gamma": call.gamma,
            **reporting(x.device, record),
            "ACTIVATION": ACTIVATIONS.index(call.activation),
            "MASKS": call.masks,
            "BATCH": call.batch,
            "WEIGHTING": WEIGHTINGS.index(call.weighting),
            "SKIP": call.skip_absent,
            "ROWS_TOO": call.by_rows != 0,
            "FOCAL": call.gamma != 0,
            "EACH": call.reduction == "none",
            "STORED": plan.stored,
            "COMPUTE": TRITON[reduce.wide(x)],
            "INDEX": _index_type(images, held, x, target if call.masks else None, grad),
            "ROWS": held.rows,
            "BLOCK": held.block,
            "CLASSES": min(power_of_two(images.c), 256),
            "num_warps": held.warps,
        }


def _launches(plan: DicePlan, share: Share) -> list[tuple[int, int]]:
    """What is launched, with how many programs."""
    if share.whole:
        return [(ALL, share.programs)]
    gradient = [(OF_GRADIENT, share.programs)] if plan.grads[0] is not None else []
    if plan.rest:
        return gradient
    return [(OF_SUMS, share.programs), (OF_OVERLAP, share.groups), *gradient]


def _index_type(images: Images, held: Tile, *tensors: Slot) -> tl.dtype:
    """Of offsets within a tile."""
    for _, c, d in map(images.classes, tensors):
        if (images.c + held.block) * abs(c) + held.rows * abs(d) >= 2**31:
            return tl.int64
    return tl.int32


@triton.jit(do_not_specialize=["record", "ignore_index"])
def _dice(
    x, target, weight, incoming, loss, grad, slopes, divisor, parts, sums,
    x_strides, target_strides, grad_strides, loss_strides, incoming_strides,
    positions, classes, first_class, groups, across, tiles, each, of_group, ignore_index,
    alpha: tl.float64, beta: tl.float64, smooth_nr: tl.float64, smooth_dr: tl.float64, scale: tl.float64,
    by_rows: tl.float64, gamma: tl.float64, claim, words, record,
    PHASE: tl.constexpr, ACTIVATION: tl.constexpr, MASKS: tl.constexpr, BATCH: tl.constexpr,
    WEIGHTING: tl.constexpr, SKIP: tl.constexpr, ROWS_TOO: tl.constexpr, FOCAL: tl.constexpr,
    EACH: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x.dtype.element_ty.primitive_bitwidth >= 32
    if STORED:
        if tl.load(incoming) == 1.0:
            return
    images = (x, target, weight, x_strides, target_strides, positions, classes, ignore_index)
    settings = (alpha, beta, smooth_nr, smooth_dr, scale)
    arrived, of_classes = tl.full((), 1.0, tl.float64), None
    if EACH:
        of_classes = incoming
    elif incoming is not None:
        arrived = tl.load(incoming).to(tl.float64)
    share = tl.full((), by_rows, tl.float64)
    if divisor is not None:
        share = share / tl.load(divisor)
    program = tl.program_id(0).to(tl.int64)
    start, stop, step, begin, end = program, program + 1, 1, program * 0, tiles
    if PHASE == 0:
        stop, step = groups, tl.num_programs(0)
    elif PHASE != 2:
        start = program // of_group
        stop = start + 1
        begin = program % of_group * each
        end = tl.minimum(begin + each, tiles)
    total, of_rows = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for group in range(start, stop, step):
        span = (group, across, begin, end)
        kept = slopes
        if slopes is not None:
            kept = slopes + (program if PHASE == 0 else group) * 2 * classes
        if PHASE < 2:
            of_rows = add_sums(
                images, span, sums + program * 4 * classes, gamma, (claim, words, record), ACTIVATION, MASKS,
                BATCH, WEIGHTING != 0, ROWS_TOO, FOCAL, EXACT, COMPUTE, INDEX, ROWS, BLOCK,
            )  # fmt: skip
        elif PHASE == 2:
            of_rows = ordered_sum(parts + groups + group * of_group, of_group, CLASSES)
            columns = 4 * classes
            settled(sums + group * of_group * columns, of_group, columns, 2048 // CLASSES, CLASSES)
        if PHASE == 0 or PHASE == 2:
            first = (group * of_group if PHASE == 2 else program) * 4 * classes
            total += overlap(
                sums + first, kept, loss, weight, of_classes, loss_strides, incoming_strides, group, settings,
                of_rows != of_rows, classes, first_class, WEIGHTING, SKIP, CLASSES,
            )  # fmt: skip
            tl.debug_barrier()
        if PHASE == 0 or PHASE == 3:
            if grad is not None:
                gradient(
                    images, span, kept, grad, grad_strides, arrived, share * arrived, gamma, ACTIVATION,
                    MASKS, BATCH, ROWS_TOO, FOCAL, EXACT, COMPUTE, INDEX, ROWS, BLOCK,
                )  # fmt: skip
        if PHASE == 0:
            total += of_rows * share
            tl.debug_barrier()
    if parts is not None:
        if PHASE == 1:
            tl.store(parts + groups + program, of_rows * share)
        elif PHASE != 3:
            tl.store(parts + program, total)
