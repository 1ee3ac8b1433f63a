"""The three matrix products of a head, on a chunk of rows, for each type of input.

float32 and float64 multiply as they are. bfloat16 and float16 multiply exactly in float32, on tiles of the
weight that are widened on the way; where the machine multiplies bfloat16 itself, in that, and the chunk
of logits is of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
TILE_BYTES = 4 << 20
NARROWEST_TILE = 64  # classes


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
        self.buffer = torch.empty(min(classes, max(NARROWEST_TILE, fit)), features)

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
    """bfloat16 by the machine's own instructions; sums over chunks are of float32."""

    def grad_input(self, g: Tensor, out: Tensor) -> None:
        out.copy_(torch.mm(g, self.weight))

    def grad_weight(self, g: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
        step = max(NARROWEST_TILE, TILE_BYTES // (2 * max(x.shape[1], 1)))
        for a in range(0, g.shape[1], step):
            product = torch.mm(g[:, a : a + step].t(), x)
            if add:
                out[a : a + step] += product
            else:
                out[a : a + step] = product


def products(weight: Tensor, bias: Tensor | None) -> Direct:
    """The products of one head, a weight (C, D) and a bias (C)."""
    if weight.dtype not in HALVES:
        return Direct(weight, bias)
    if weight.device.type != "cpu" or (weight.dtype is torch.bfloat16 and multiplies_bfloat16()):
        return Native(weight, bias)
    return Widened(weight, bias)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; elsewhere torch takes up to 200 times as long."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
