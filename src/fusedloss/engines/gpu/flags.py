"""What kernels find wrong in the values of tensors, told without a sync.

A kernel writes to a few words of pinned memory of the host, which only errors cost anything: position,
value, and the number of a record that says what they mean. The host looks at the first word before
each launch.
"""

from __future__ import annotations

import ctypes
from typing import NoReturn, Protocol

import torch
import triton
import triton.language as tl

from ...core import levels

WORDS = 5  # written, record, position, two values


class Record(Protocol):
    """What a launch checks; equal ones share a number, so that there are few."""

    def fail(self, position: int, first: int, second: int) -> NoReturn: ...


class Flags:
    """The words of one device, and the claim that makes the first kernel to find an error their owner."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.words = torch.zeros(WORDS, dtype=torch.int64, pin_memory=device.type == "cuda")
            self.claim = torch.zeros(1, dtype=torch.int32, device=device)
        self.device = device
        self.seen = (ctypes.c_int64 * WORDS).from_address(self.words.data_ptr())

    def raise_pending(self) -> None:
        if self.seen[0]:
            self._raise()

    def _raise(self) -> NoReturn:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the other words may be on their way
        _, record, position, first, second = self.seen
        self.words.zero_()
        self.claim.zero_()
        _by_number[record].fail(position, first, second)


_flags: dict[torch.device, Flags] = {}
_numbers: dict[Record, int] = {}
_by_number: list[Record] = []


def of(device: torch.device) -> Flags:
    found = _flags.get(device)
    if found is None:
        found = _flags[device] = Flags(device)
    return found


def number(record: Record) -> int:
    found = _numbers.get(record)
    if found is None:
        found = _numbers[record] = len(_by_number)
        _by_number.append(record)
    return found


def raise_pending(device: torch.device) -> None:
    """Raises what an earlier kernel on the device found, if it is known by now."""
    found = _flags.get(device)
    if found is not None and found.seen[0] and not _capturing(device):
        found.raise_pending()


def raise_if_eager(device: torch.device) -> None:
    """With `checks("eager")`: raises what the kernel just launched finds."""
    if levels.eager() and not _capturing(device):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        of(device).raise_pending()


def raise_all() -> None:
    for found in _flags.values():
        found.raise_pending()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@triton.jit
def report(claim, words, record, position, first, second):
    """Only the first to claim the words writes them."""
    if tl.atomic_cas(claim, 0, 1) == 0:
        tl.store(words + 1, record)
        tl.store(words + 2, position)
        tl.store(words + 3, first)
        tl.store(words + 4, second)
        tl.debug_barrier()
        tl.store(words, 1)
