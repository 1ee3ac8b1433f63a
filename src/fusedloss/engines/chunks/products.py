"""The three matrix products of a head, on a chunk of rows, for each type of input.

float32 and float64 multiply as they are. bfloat16 and float16 multiply exactly in float32, on tiles of the
weight that are widened on the way. Where a CPU multiplies bfloat16 itself, in that, and a second product keeps
what rounding took from those logits of which it counts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.torch_state import any_autocast
from ...kinds.heads import Slot
from ..cpu import linear as kernel

HALVES = (torch.bfloat16, torch.float16)
TILE_BYTES = 4 << 20
NARROWEST_TILE = 64  # classes
LARGE = 1 << 20  # elements, from which on large pages are asked for


class Direct:
    """`weight` is (C, D) of the inputs' type."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.chunk_dtype = weight.dtype

    def rows(self, input: Tensor) -> Tensor:
        """The rows of a chunk as the products take them."""
        return input

    def logits(self, x: Tensor, out: Tensor, first: int = 0) -> None:
        """Those of the classes [first, first + out.shape[1])."""
        last = first + out.shape[1]
        torch.mm(x, self.weight[first:last].t(), out=out)
        self.add_bias(out, first, last)

    def add_bias(self, out: Tensor, first: int, last: int) -> None:
        if self.bias is not None:
            out += self.bias[first:last]

    def grad_input(self, g: Tensor, out: Tensor) -> None:
        torch.mm(g, self.weight, out=out)

    def grad_weight(self, g: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
        if add:
            out.addmm_(g.t(), x)
        else:
            torch.mm(g.t(), x, out=out)


class Widened(Direct):
    """float32 tiles of a weight of a half type."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.chunk_dtype = torch.float32
        classes, features = weight.shape
        fit = TILE_BYTES // (4 * max(features, 1))
        rows = max(1, min(classes, max(NARROWEST_TILE, fit)))  # a shard may have no class
        self.buffer = weight.new_empty(rows, features, dtype=self.chunk_dtype)

    def rows(self, input: Tensor) -> Tensor:
        return input.float()

    def tiles(self, first: int, last: int) -> Iterator[tuple[int, int, Tensor]]:
        for a in range(first, last, len(self.buffer)):
            b = min(a + len(self.buffer), last)
            yield a, b, self.buffer[: b - a].copy_(self.weight[a:b])

    def logits(self, x: Tensor, out: Tensor, first: int = 0) -> None:
        for a, b, weight in self.tiles(first, first + out.shape[1]):
            torch.mm(x, weight.t(), out=out[:, a - first : b - first])
        self.add_bias(out, first, first + out.shape[1])

    def grad_input(self, g: Tensor, out: Tensor) -> None:
        out.zero_()
        for a, b, weight in self.tiles(0, g.shape[1]):
            out.addmm_(g[:, a:b], weight)


class Native(Direct):
    """bfloat16 by the machine's own instructions, which round; sums over chunks are of float32."""

    def lost(self, x: Tensor, logits: Tensor, first: int = 0) -> Tensor:
        """What rounding took from logits."""
        return rounded_away(x, self.weight[first : first + logits.shape[1]], logits)

    def grad_input(self, g: Tensor, out: Tensor) -> None:
        out.copy_(multiplied(g, self.weight))

    def grad_weight(self, g: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
        step = max(NARROWEST_TILE, TILE_BYTES // (2 * max(x.shape[1], 1)))
        product = x.new_empty(min(step, g.shape[1]), x.shape[1])
        for a in range(0, g.shape[1], step):
            columns = g[:, a : a + step]
            part = product[: columns.shape[1]]
            torch.mm(columns.t(), x, out=part)
            if out.is_cpu:
                kernel.accumulate(part, out[a : a + step], add)
            elif add:
                out[a : a + step] += part
            else:
                out[a : a + step] = part


class Accelerated(Direct):
    """Half types on a GPU, whose products may be of float32 and add to what is there."""

    def grad_input(self, g: Tensor, out: Tensor) -> None:
        torch.mm(g, self.weight, out_dtype=torch.float32, out=out)

    def grad_weight(self, g: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
        if add:
            torch.addmm(out, g.t(), x, out_dtype=torch.float32, out=out)
        else:
            torch.mm(g.t(), x, out_dtype=torch.float32, out=out)


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """The product in the type of its operands: autocast leaves what is written to alone."""
    if a.shape[0] * b.shape[1] < LARGE and not any_autocast():
        return torch.mm(a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    kernel.advise_huge_pages(out)
    return torch.mm(a, b, out=out)


def rounded_away(x: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    """What rounding took from logits: sums of float32, rounded once."""
    return torch.addmm(logits, x, weight.t(), beta=-1, out=torch.empty_like(logits))


def products(weight: Tensor, bias: Slot, exact: bool) -> Direct:
    """The products of one head, a weight (C, D) and a bias (C); `exact` ones keep all digits."""
    if weight.dtype not in HALVES:
        return Direct(weight, bias)
    if exact:
        return Widened(weight, bias)
    if weight.is_cuda and torch.version.hip is None:
        return Accelerated(weight, bias)
    if weight.device.type != "cpu" or multiplies(weight.dtype):
        return Native(weight, bias)
    return Widened(weight, bias)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU's own products serve a half type."""
    return dtype is torch.bfloat16 and multiplies_bfloat16()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; elsewhere torch takes up to 200 times as long."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
