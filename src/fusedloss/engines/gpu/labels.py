"""Class indices, and those that are out of range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
import triton
import triton.language as tl

from ...core import errors
from . import flags


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
