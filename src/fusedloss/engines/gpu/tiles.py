"""How much of the rows a program takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .launch import power_of_two

WIDEST = 8192  # classes that a program holds in registers


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
