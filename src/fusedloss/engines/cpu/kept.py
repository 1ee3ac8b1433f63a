"""The arguments of a kernel that are kept: pointers change from call to call, and how many rows there are."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ...core import errors
from ...core.plain import Unreadable
from .. import abi
from .load import NUMBERS, library, run


class Kept:
    """A kernel with all its arguments but the pointers of these names."""

    __slots__ = ("again", "at", "kernel", "loss", "pack", "plan", "whole", "words")

    def __init__(
        self,
        kernel: str,
        loss: str,
        pointers: Sequence[str],
        numbers: Mapping[str, Any],
    ) -> None:
        block = abi.KERNELS[kernel]
        absent = {f.name: f.inner.absent if f.inner else 0 for f in block.fields}
        self.kernel, self.loss = kernel, loss
        arguments = block.packer()(**{**absent, **numbers})
        self.at = tuple(map(block.place, pointers))
        self.whole = struct.Struct(f"={len(arguments) // 8}q")
        self.words = list(self.whole.unpack(arguments))
        head = (NUMBERS[kernel], len(self.words), len(self.at), *self.at)
        self.plan = struct.pack(f"={len(head)}q", *head) + arguments
        self.pack = struct.Struct(f"={len(self.at)}q").pack
        self.again = library().fusedloss_again

    def __call__(self, *pointers: int) -> int:
        """What the kernel returns."""
        found: int = self.again(self.plan, self.pack(*pointers))
        if found == abi.UNREADABLE:
            raise Unreadable
        if found == abi.NO_MEMORY:
            errors.fail(RuntimeError, self.loss, "can't allocate memory for the kernel")
        return found

    def of(self, rows: int, place: int, *pointers: int) -> int:
        """The same of another number of rows, the word at `place`."""
        words = self.words.copy()
        for at, pointer in zip((place, *self.at), (rows, *pointers), strict=True):
            words[at] = pointer
        return run(self.kernel, self.loss, self.whole.pack(*words))
