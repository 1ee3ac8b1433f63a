"""The loop over chunks of rows: logits, the row step in their place, and the products of their gradient.

    logits = x W^T -> step: losses, and the logits become g -> grad_input = g W, grad_weight += g^T x

Nothing of the size of all logits exists. Rows that do not count take part in no product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import errors
from ...core.reduce import wide
from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall, Rows, Slot, Slots
from .. import abi, gpu
from ..cpu import linear as kernel
from . import steps
from .products import HALVES, TILE_BYTES, Direct, products

BUDGET = 64 << 20
LEAST_ON_GPU, MOST_ON_GPU = 256 << 20, 1 << 30  # smaller products leave a GPU idle
FORWARD_BUDGET = 10 << 20  # with what a matrix product takes itself, 16 MiB
FORWARD_ROWS = 512
SUM_BLOCK = 1 << 14
ALIGNED = 16  # rows; odd numbers slow the products down


Index = slice | Tensor


class Plan(NamedTuple):
    """How much of the logits is there at a time."""

    rows: int
    classes: int


def plan(call: LinearCall, input: Tensor, classes: int, differentiate: bool) -> Plan:
    """Chunks within the budget. ValueError where not even one row fits."""
    n, features = input.shape
    half, triton = input.dtype in HALVES, takes_triton(call, input)
    computed = wide(input).itemsize
    size = input.element_size() if input.is_cuda and triton else computed  # of logits
    # Beside the logits: the row itself, its gradient, and a few numbers of it.
    per_row = size * call.logits * classes + 2 * computed * features + 128
    fixed = TILE_BYTES if half and not input.is_cuda else 0
    half_a_gradient = computed * classes * features // 2
    default = min(max(half_a_gradient, LEAST_ON_GPU), MOST_ON_GPU) if input.is_cuda else BUDGET
    budget = call.memory_budget or default
    if budget < per_row + fixed:
        errors.fail(
            ValueError,
            call.loss,
            f"memory_budget = {budget} bytes does not hold one row of {classes} classes and "
            f"{features} features: the least is {per_row + fixed}",
        )
    if differentiate or not on_host(input) or call.logits > 1:
        # Where there is no kernel, torch operations take copies of the logits.
        per_row *= 1 if on_host(input) or triton else 6
        # An eighth is for what the matrix products take themselves.
        most, width = (budget * 7 // 8 - fixed) // per_row, classes
    else:
        budget = min(budget, FORWARD_BUDGET) - fixed
        most = min(FORWARD_ROWS, max(1, budget // (size * (64 + 2 * features) + 128)))
        most = most if most <= ALIGNED else most // ALIGNED * ALIGNED
        width = (budget - most * (2 * size * features + 128)) // (size * most)
        width = min(classes, max(64, width // 64 * 64))
    most = max(1, min(most, call.chunk_rows or n, n))
    rows = -(-max(n, 1) // max(1, -(-n // most)))  # all chunks alike
    aligned = -(-rows // ALIGNED) * ALIGNED
    return Plan(aligned if aligned <= most else rows, width)


def run(
    call: LinearCall,
    tensors: Slots,
    needed: Sequence[bool] = (),
    incoming: Sequence[Slot] | None = None,
) -> tuple[tuple[Tensor, ...], list[Slot]]:
    """The results of the call, and the gradients that are needed.

    Reduced losses differentiate themselves; others by `incoming`, the gradients of all results.
    Gradients by half types are of float32, for whoever scales and rounds them.
    """
    loop = LOOPS[call.family](call, tensors, needed, incoming)
    for head in range(loop.heads):
        loop.head(head)
    return call.results(loop.results, tensors, _in_blocks), loop.grads


def _in_blocks(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Their sum in an order that does not depend on threads, among whom torch shares longer ones."""
    flat = values.reshape(-1)
    whole = flat.shape[0] // SUM_BLOCK * SUM_BLOCK
    if not whole or not flat.is_cpu:
        return flat.sum(dtype=dtype)
    blocks = flat[:whole].view(-1, SUM_BLOCK).sum(1, dtype=dtype)
    return blocks.sum() + flat[whole:].sum(dtype=dtype)


def on_host(input: Tensor) -> bool:
    """Whether the row steps are those of the C++ core."""
    return input.is_cpu and not gpu.serves(input)


def takes_triton(call: LinearCall, input: Tensor) -> bool:
    """Whether the row steps are Triton's; elsewhere they are torch operations."""
    indices = call.family == "linear" and not call.probabilities
    return indices and gpu.serves(input) and gpu.problem(call.family) is None


class _Loop:
    def __init__(
        self,
        call: LinearCall,
        tensors: Slots,
        needed: Sequence[bool],
        incoming: Sequence[Slot] | None,
    ) -> None:
        input, linear_weight, linear_bias, target, weight, sample_weight = tensors[:6]
        assert input is not None and linear_weight is not None
        self.call, self.tensors = call, tensors
        self.input, self.target = input, target
        self.linear_weight, self.linear_bias = linear_weight, linear_bias
        self.sample_weight = sample_weight
        self.classes, self.heads = linear_weight.shape[:2]
        self.plan = plan(call, input, self.classes, any(needed))
        self.weight = None if weight is None else weight.to(wide(input)).contiguous()
        self.vectors = torch.float64 if on_host(input) else wide(input)
        self.results = Rows(*(self.of_rows() for _ in range(4 if call.statistics else 1)))
        self.incoming = self.incoming_rows(incoming) if any(needed) else None
        self.grads = self.gradients(needed)
        self.chunk: Slot = None
        self.low: Slot = None  # what rounding took from the chunk

    def of_rows(self) -> Tensor:
        """A number for each row, (N, K), those of a head side by side."""
        return self.input.new_zeros(self.heads, self.input.shape[0], dtype=self.vectors).t()

    def incoming_rows(self, incoming: Sequence[Slot] | None) -> Rows:
        loss, *rest = incoming or (None,)
        if loss is not None or not self.call.statistics:
            loss = self.call.scale(self.tensors, loss)
            loss = self.input.new_ones(()) if loss is None else loss
        else:
            loss = self.input.new_zeros(())
        return Rows(loss, *rest).each(lambda t: self.of_rows().copy_(t))

    def gradients(self, needed: Sequence[bool]) -> list[Slot]:
        input, linear_weight, linear_bias, target, *_ = self.tensors
        found: list[Slot] = [None] * 4
        for k, (tensor, need) in enumerate(
            zip((input, linear_weight, linear_bias, target), needed, strict=False)
        ):
            if need and tensor is not None:
                dtype = tensor.dtype if k == 3 else wide(tensor)
                make = torch.zeros if k == 0 else torch.empty
                found[k] = make(tensor.shape, dtype=dtype, device=tensor.device)
                kernel.advise_huge_pages(found[k])
        return found

    def head(self, head: int) -> None:
        """All rows of one head."""
        bias = None if self.linear_bias is None else self.linear_bias[:, head]
        product = products(self.linear_weight[:, head], bias, on_host(self.input))
        if self.chunk is None:
            size, dtype = self.plan.rows * self.plan.classes, product.chunk_dtype
            self.chunk = torch.empty(size, dtype=dtype, device=self.input.device)
            kernel.advise_huge_pages(self.chunk)
            self.low = torch.empty_like(self.chunk) if product.splits else None
            kernel.advise_huge_pages(self.low)
        kept = self.kept(head)
        n = self.input.shape[0] if kept is None else kept.shape[0]
        for a in range(0, n, self.plan.rows):
            b = min(a + self.plan.rows, n)
            rows = slice(a, b) if kept is None else kept[a:b]
            if self.incoming is None and on_host(self.input) and self.call.logits == 1:
                self.evaluate(product, head, rows, b - a)
            else:
                self.differentiate(product, head, rows, b - a, add=a > 0)
        if not n:
            for grad in self.grads[1:3]:
                if grad is not None:
                    grad[:, head].zero_()

    def kept(self, head: int) -> Slot:
        """The rows that count; None where all do, or where to find out would stop a queue."""
        if not on_host(self.input) or self.grads[3] is not None:
            return None
        counted = self.call.counted(self.target)
        masks = [] if counted is None else [counted[:, head]]
        if self.sample_weight is not None:
            masks.append(self.sample_weight[:, head] != 0)
        if self.incoming is not None and self.incoming.lse is self.incoming.entropy is None:
            masks.append(self.incoming.loss[:, head] != 0)
        if not masks:
            return None
        mask = torch.stack(masks).all(0)
        return None if mask.all() else mask.nonzero().squeeze(1)

    def targets(self, head: int, rows: Index) -> Tensor:
        """Of some rows: class indices (n), or probabilities (n, C)."""
        assert self.target is not None
        if self.call.probabilities:
            return self.target[:, :, head][rows]
        return self.target[:, head][rows].to(torch.int64).contiguous()

    def evaluate(self, product: Direct, head: int, rows: Index, n: int) -> None:
        """The results of some rows; their logits come in stretches of classes."""
        x, target = product.rows(self.input[rows]), self.targets(head, rows)
        results = self.results.each(lambda t: t[:, head][rows])
        sums = torch.empty(n, abi.LINEAR_SUMS, dtype=torch.float64)
        for first in range(0, self.classes, self.plan.classes):
            columns = min(self.plan.classes, self.classes - first)
            logits, low = self.matrices(n, columns)
            product.logits(x, logits, low, first)
            given = (self.call, logits, target, self.weight, results)
            kernel.step(*given, first=first, classes=self.classes, sums=sums, low=low)
        self.keep(results, head, rows)

    def differentiate(self, product: Direct, head: int, rows: Index, n: int, add: bool) -> None:
        """The results of some rows, and their part of the gradients that are needed."""
        x = product.rows(self.input[rows])
        g, low = self.matrices(n, self.classes)
        product.logits(x, g, low)
        results = self.results.each(lambda t: t[:, head][rows])
        arriving = self.incoming and self.incoming.each(lambda t: t[:, head][rows])
        self.step(g, low, head, rows, results, arriving)
        self.keep(results, head, rows)
        grad_input, grad_weight, grad_bias, _ = self.grads
        if grad_input is not None:
            if self.heads == 1 and isinstance(rows, slice):
                product.grad_input(g, grad_input[rows])
            else:
                part = grad_input.new_empty(n, grad_input.shape[1])
                product.grad_input(g, part)
                grad_input[rows] += part
        if grad_weight is not None:
            product.grad_weight(g, x, grad_weight[:, head], add)
        if grad_bias is not None:
            total = g.sum(0, dtype=grad_bias.dtype)
            grad_bias[:, head] = grad_bias[:, head] + total if add else total

    def matrices(self, n: int, columns: int) -> tuple[Tensor, Slot]:
        """The logits of some rows in the chunk, and what rounding took from them."""
        assert self.chunk is not None
        high, low = (
            None if t is None else t[: n * columns].view(n, columns) for t in (self.chunk, self.low)
        )
        assert high is not None
        return high, low

    def step(
        self,
        logits: Tensor,
        low: Slot,
        head: int,
        rows: Index,
        results: Rows,
        incoming: Rows | None,
    ) -> None:
        if takes_triton(self.call, self.input):
            assert self.target is not None and isinstance(rows, slice)
            target, first = self.target[:, head][rows], rows.start * self.heads + head
            given = (self.call, logits, target, self.weight, results, incoming)
            try:
                return gpu.family("linear").step(*given, first, self.target.shape)
            except gpu.Failed as failed:
                gpu.turn_off(failed, self.call.family)
        grad_target = self.grads[3]
        grad_target = None if grad_target is None else grad_target[:, :, head][rows]
        target = self.targets(head, rows)
        arguments = (self.call, logits, target, self.weight, results, incoming, grad_target)
        if on_host(self.input):
            kernel.step(*arguments, low=low)
        else:
            steps.step(*arguments)

    def keep(self, results: Rows, head: int, rows: Index) -> None:
        """Gathered rows go back to where they are from."""
        if isinstance(rows, Tensor):
            for whole, part in zip(self.results, results, strict=True):
                if whole is not None and part is not None:
                    whole[:, head][rows] = part


class _DistillLoop(_Loop):
    """With the teacher's logits of the same rows in a chunk beside."""

    def step(
        self,
        logits: Tensor,
        low: Slot,
        head: int,
        rows: Index,
        results: Rows,
        incoming: Rows | None,
    ) -> None:
        assert isinstance(self.call, DistillCall)
        teacher, teacher_low = self.teacher(rows)
        target = None if self.target is None else self.targets(head, rows)
        given = (self.call, logits, teacher, target, results, incoming)
        if on_host(self.input):
            kernel.distill(*given, low=low, teacher_low=teacher_low)
        else:
            steps.distill(*given)

    def teacher(self, rows: Index) -> tuple[Tensor, Slot]:
        """The teacher's logits of some rows, and what rounding took from them."""
        input, weight, bias, logits = self.tensors[7:]
        if logits is not None:
            return logits[rows], None
        assert input is not None and weight is not None
        if not hasattr(self, "product"):
            bias = None if bias is None else bias[:, 0]
            self.product = products(weight[:, 0], bias, on_host(self.input))
            shape, dtype = (self.plan.rows, self.classes), self.product.chunk_dtype
            self.other = torch.empty(shape, dtype=dtype, device=input.device)
            kernel.advise_huge_pages(self.other)
            self.other_low = torch.empty_like(self.other) if self.product.splits else None
            kernel.advise_huge_pages(self.other_low)
        x = self.product.rows(input[rows])
        out = self.other[: x.shape[0]]
        low = None if self.other_low is None else self.other_low[: x.shape[0]]
        self.product.logits(x, out, low)
        return out, low


LOOPS = {"linear": _Loop, "distill": _DistillLoop}
