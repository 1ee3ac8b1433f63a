"""Launches, and the last step of a reduction: partial sums, added in order by one program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import flags
from .available import Failed

MOST_PROGRAMS = 2048  # of a loop over blocks: one wave on today's GPUs, and few partial sums


@dataclass
class Tape:
    """Launches that were not made, and the memory that they would need for themselves."""

    launches: list[tuple[Any, int, dict[str, Any]]] = field(default_factory=list)
    scratch: list[Tensor] = field(default_factory=list)


_tape: Tape | None = None


@contextlib.contextmanager
def taped() -> Iterator[Tape]:
    """Inside, nothing is launched."""
    global _tape
    outer, _tape = _tape, Tape()
    try:
        yield _tape
    finally:
        _tape = outer


def scratch(size: int, device: torch.device) -> Tensor:
    """Memory in float64 for a kernel to leave to another."""
    memory = torch.empty(size, dtype=torch.float64, device=device)
    if _tape is not None:
        _tape.scratch.append(memory)
    return memory


def launch(kernel: Any, programs: int, device: torch.device, **arguments: Any) -> None:
    """Runs `kernel` on the device of its tensors; Failed where Triton cannot."""
    if _tape is not None:
        _tape.launches.append((kernel, programs, arguments))
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    try:
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            run(kernel, programs, arguments)
    except Exception as error:
        raise Failed(f"{type(error).__name__}: {error}"[:500]) from error


def run(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    kernel[(programs,)](**arguments, enable_fp_fusion=True)


def ready(kernel: Any, programs: int, arguments: dict[str, Any]) -> Any:
    """The compiled kernel of a launch that was made before; None where Triton interprets."""
    try:
        return kernel.run(grid=(programs,), warmup=True, **arguments, enable_fp_fusion=True)
    except Exception as error:
        raise Failed(f"{type(error).__name__}: {error}"[:500]) from error


def reporting(device: torch.device, record: flags.Record | None) -> dict[str, Any]:
    """The arguments of a kernel by which it tells what it finds wrong."""
    if record is None:
        return {"claim": None, "words": None, "record": 0}
    told = flags.of(device)
    return {"claim": told.claim, "words": told.words, "record": flags.number(record)}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def finish(partial: Tensor, result: Tensor, denominator: float | Tensor) -> None:
    """The sum of `partial` over the denominator; one held in a tensor is itself the sum of that."""
    held = isinstance(denominator, Tensor)
    count = partial.numel()
    launch(
        _finish,
        1,
        result.device,
        partial=partial,
        divisors=denominator if held else None,
        result=result,
        count=count,
        divisor_count=denominator.numel() if isinstance(denominator, Tensor) else 0,
        denominator=1.0 if isinstance(denominator, Tensor) else denominator,
        BLOCK=min(power_of_two(count), 8192),
        num_warps=8,
    )


@triton.jit
def ordered_sum(values, count, BLOCK: tl.constexpr):
    """In float64, each lane a sum of its own until the last."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        index = start + lane
        total += tl.load(values + index, mask=index < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def _finish(
    partial,
    divisors,
    result,
    count,
    divisor_count,
    denominator: tl.float64,
    BLOCK: tl.constexpr,
):
    total = ordered_sum(partial, count, BLOCK)
    if divisors is not None:
        total = total / ordered_sum(divisors, divisor_count, BLOCK)
    else:
        total = total / denominator
    tl.store(result, total.to(result.dtype.element_ty))
