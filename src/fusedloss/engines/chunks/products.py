"""The three matrix products of a head, on a chunk of rows, for each type of input.

float32 and float64 multiply as they are. bfloat16 and float16 multiply exactly in float32, on tiles of the
weight that are widened on the way. Where a CPU multiplies bfloat16 itself, in that, and the logits are
multiplied twice: the second product keeps what rounding took from the first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...kinds.heads import Slot
from ..cpu import linear as kernel

HALVES = (torch.bfloat16, torch.float16)
TILE_BYTES = 4 << 20
NARROWEST_TILE = 64  # classes


class Direct:
    """`weight` is (C, D) of the inputs' type."""

    splits = False  # the logits are the sum of two chunks

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.chunk_dtype = weight.dtype

    def rows(self, input: Tensor) -> Tensor:
        """The rows of a chunk as the products take them."""
        return input

    def logits(self, x: Tensor, out: Tensor, low: Slot, first: int = 0) -> None:
        """Those of the classes [first, first + out.shape[1]); `low` where this `splits` them."""
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
        rows = min(classes, max(NARROWEST_TILE, fit))
        self.buffer = torch.empty(rows, features, dtype=self.chunk_dtype)

    def rows(self, input: Tensor) -> Tensor:
        return input.float()

    def tiles(self, first: int, last: int) -> Iterator[tuple[int, int, Tensor]]:
        for a in range(first, last, len(self.buffer)):
            b = min(a + len(self.buffer), last)
            yield a, b, self.buffer[: b - a].copy_(self.weight[a:b])

    def logits(self, x: Tensor, out: Tensor, low: Slot, first: int = 0) -> None:
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
        product = x.new_empty(min(step, g.shape[1]), x.shape[1])
        for a in range(0, g.shape[1], step):
            columns = g[:, a : a + step]
            part = product[: columns.shape[1]]
            torch.mm(columns.t(), x, out=part)
            self.take(part, out[a : a + step], add)

    def take(self, product: Tensor, out: Tensor, add: bool) -> None:
        if add:
            out += product
        else:
            out.copy_(product)


class Accelerated(Direct):
    """Half types on a GPU, whose products may be of float32 and add to what is there."""

    def grad_input(self, g: Tensor, out: Tensor) -> None:
        torch.mm(g, self.weight, out_dtype=torch.float32, out=out)

    def grad_weight(self, g: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
        if add:
            torch.addmm(out, g.t(), x, out_dtype=torch.float32, out=out)
        else:
            torch.mm(g.t(), x, out_dtype=torch.float32, out=out)


class Split(Native):
    """On a CPU, where a kernel takes the logits: in two parts, the second what rounding took from the first."""

    splits = True

    def logits(self, x: Tensor, out: Tensor, low: Slot, first: int = 0) -> None:
        assert low is not None
        last = first + out.shape[1]
        weight = self.weight[first:last].t()
        torch.mm(x, weight, out=out)
        torch.addmm(out, x, weight, beta=-1, out=low)  # sums of float32, rounded once
        if self.bias is None:
            return
        step = max(1, TILE_BYTES // (4 * out.shape[1]))
        for high, rest in zip(out.split(step), low.split(step), strict=True):
            # The rounding of an infinite logit took NaN.
            exact = rest.float().nan_to_num_(0.0).add_(high).add_(self.bias[first:last])
            high.copy_(exact)
            rest.copy_(exact.sub_(high))

    def take(self, product: Tensor, out: Tensor, add: bool) -> None:
        kernel.accumulate(product, out, add)


def products(weight: Tensor, bias: Tensor | None, host: bool) -> Direct:
    """The products of one head, a weight (C, D) and a bias (C); on a `host` a kernel takes their logits."""
    if weight.dtype not in HALVES:
        return Direct(weight, bias)
    if weight.is_cuda and torch.version.hip is None:
        return Accelerated(weight, bias)
    if weight.device.type != "cpu" or (weight.dtype is torch.bfloat16 and multiplies_bfloat16()):
        return Split(weight, bias) if host else Native(weight, bias)
    return Widened(weight, bias)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; elsewhere torch takes up to 200 times as long."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
