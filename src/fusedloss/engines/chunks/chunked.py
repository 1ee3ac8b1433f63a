"""The loop over chunks of rows: logits, the row step in their place, and the products of their gradient.

    logits = x W^T -> step: losses, and the logits become g -> grad_input = g W, grad_weight += g^T x

Nothing of the size of all logits exists. Rows that do not count take part in no product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.reduce import wide
from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall, Rows, Slot, Slots
from .. import abi, gpu
from ..cpu import linear as kernel
from . import steps
from .plan import AGAIN, ORDINARY, Plan, on_host, plan, rounded, takes_triton
from .products import Direct, Native, products

Index = slice | Tensor


class Loop:
    """Over all rows of each head, by the formula of the module."""

    def __init__(
        self,
        call: LinearCall,
        tensors: Slots,
        needed: Sequence[bool] = (),
        incoming: Sequence[Slot] | None = None,
    ) -> None:
        input, linear_weight, linear_bias, target, weight, sample_weight = tensors[:6]
        assert input is not None and linear_weight is not None
        self.call, self.tensors = call, tensors
        self.input, self.target = input, target
        self.linear_weight, self.linear_bias = linear_weight, linear_bias
        self.sample_weight = sample_weight
        self.classes, self.heads = linear_weight.shape[:2]
        self.plan = self.planned(any(needed))
        self.weight = None if weight is None else weight.to(wide(input)).contiguous()
        self.vectors = torch.float64 if on_host(input) else wide(input)
        self.results = Rows(*(self.of_rows() for _ in range(4 if call.statistics else 1)))
        self.incoming = self.incoming_rows(incoming) if any(needed) else None
        self.grads = self.gradients(needed)
        self.chunk: Slot = None
        self.bias: Slot = None  # of the head, where the row step adds it
        self.rounds = [rounded(t) for t in (input, *tensors[7:8]) if t is not None]

    def planned(self, differentiate: bool) -> Plan:
        return plan(self.call, self.input, self.classes, differentiate)

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
        product = self.products(self.linear_weight[:, head], self.linear_bias, head)
        self.bias = self.added(self.linear_bias, head)
        if self.chunk is None:
            size, dtype = self.plan.rows * self.plan.classes, product.chunk_dtype
            self.chunk = torch.empty(size, dtype=dtype, device=self.input.device)
            kernel.advise_huge_pages(self.chunk)
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

    def products(self, weight: Tensor, bias: Slot, head: int = 0) -> Direct:
        """Those of one head; on the host the row step adds the bias."""
        host = on_host(self.input)
        own = None if host or bias is None else bias[:, head]
        return products(weight, own, self.call.exact_logits and not host)

    def added(self, bias: Slot, head: int = 0) -> Slot:
        """The bias of one head in the type that the row step computes in, where that adds it."""
        if bias is None or not on_host(self.input):
            return None
        return bias[:, head].to(wide(self.input)).contiguous()

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
            logits = self.matrix(n, columns)
            product.logits(x, logits, first)
            lost = product.lost(x, logits, first) if isinstance(product, Native) else None
            bias = None if self.bias is None else self.bias[first:]
            given = (self.call, kernel.Logits(logits, lost, bias), target, self.weight, results)
            last = first + columns == self.classes
            stretch = kernel.Stretch(first, self.classes, first == 0, last)
            kernel.step(*given, stretch=stretch, sums=sums)
        self.keep(results, head, rows)

    def differentiate(self, product: Direct, head: int, rows: Index, n: int, add: bool) -> None:
        """The results of some rows, and their part of the gradients that are needed."""
        x = product.rows(self.input[rows])
        g = self.matrix(n, self.classes)
        product.logits(x, g)
        beyond = torch.empty(n, dtype=torch.int64) if any(self.rounds) else None
        if self.step(g, head, rows, beyond=beyond) > 0:
            self.step_exactly(product, x, g, head, rows, beyond)
        self.multiply(product, x, g, head, rows, add)

    def multiply(
        self, product: Direct, x: Tensor, g: Tensor, head: int, rows: Index, add: bool
    ) -> None:
        """Their part of the gradients, from that of the logits."""
        grad_input, grad_weight, grad_bias, _ = self.grads
        if grad_input is not None:
            if self.heads == 1 and isinstance(rows, slice):
                product.grad_input(g, grad_input[rows])
            else:
                part = grad_input.new_empty(g.shape[0], grad_input.shape[1])
                product.grad_input(g, part)
                grad_input[rows] += part
        if grad_weight is not None:
            product.grad_weight(g, x, grad_weight[:, head], add)
        if grad_bias is not None:
            total = g.sum(0, dtype=grad_bias.dtype)
            grad_bias[:, head] = grad_bias[:, head] + total if add else total

    def matrix(self, n: int, columns: int) -> Tensor:
        """The logits of some rows, in the chunk."""
        assert self.chunk is not None
        return self.chunk[: n * columns].view(n, columns)

    def ordinary(self, rounds: bool) -> float:
        """The size of logits up to which roundings of theirs, if there are any, do not count."""
        if not rounds:
            return math.inf
        return -1.0 if self.call.exact_logits or self.incoming is None else ORDINARY

    def step(
        self,
        logits: Tensor,
        head: int,
        rows: Index,
        lost: Slot = None,
        beyond: Slot = None,
        exactly: bool = False,
    ) -> int:
        """Logits become their gradient; of rows `beyond` what is ordinary they stay, and so many there are."""
        results = self.results.each(lambda t: t[:, head][rows])
        incoming = self.incoming and self.incoming.each(lambda t: t[:, head][rows])
        found = self.run_step(logits, head, rows, results, incoming, lost, beyond, exactly)
        self.keep(results, head, rows)
        return found

    def step_exactly(
        self, product: Direct, x: Tensor, g: Tensor, head: int, rows: Index, beyond: Slot
    ) -> None:
        """Once more for the rows that stayed, with what rounding took from their logits."""
        assert beyond is not None
        for part in beyond.nonzero().squeeze(1).split(-(-len(beyond) // AGAIN)):
            logits = g[part]
            lost = self.lost(product, x[part], logits)
            self.step(logits, head, some(rows, part), lost, exactly=True)
            g[part] = logits

    def lost(self, product: Direct, x: Tensor, logits: Tensor) -> Slot:
        """What rounding took from logits, if they are rounded."""
        return product.lost(x, logits) if isinstance(product, Native) else None

    def run_step(
        self,
        logits: Tensor,
        head: int,
        rows: Index,
        results: Rows,
        incoming: Rows | None,
        lost: Slot,
        beyond: Slot,
        exactly: bool,
    ) -> int:
        if takes_triton(self.call, self.input):
            assert self.target is not None and isinstance(rows, slice)
            target, first = self.target[:, head][rows], rows.start * self.heads + head
            given = (self.call, logits, target, self.weight, results, incoming)
            try:
                gpu.family("linear").step(*given, first, self.target.shape)
                return 0
            except gpu.Failed as failed:
                gpu.turn_off(failed, self.call.family)
        grad_target = self.grads[3]
        part = None if grad_target is None else grad_target[:, :, head][rows]
        target = self.targets(head, rows)
        if not on_host(self.input):
            steps.step(self.call, logits, target, self.weight, results, incoming, part)
            return 0
        own = kernel.Logits(logits, lost, self.bias)
        arguments = (self.call, own, target, self.weight, results, incoming, part)
        found = kernel.step(*arguments, ordinary=self.ordinary(self.rounds[0]), beyond=beyond)
        if grad_target is not None and part is not None and not isinstance(rows, slice):
            grad_target[:, :, head][rows] = part
        return found

    def keep(self, results: Rows, head: int, rows: Index) -> None:
        """Gathered rows go back to where they are from."""
        if isinstance(rows, Tensor):
            for whole, part in zip(self.results, results, strict=True):
                if whole is not None and part is not None:
                    whole[:, head][rows] = part

    def close(self) -> None:
        """After all heads."""


def some(rows: Index, part: Tensor) -> Tensor:
    """Of these rows those at the places `part`."""
    return part + rows.start if isinstance(rows, slice) else rows[part]


class DistillLoop(Loop):
    """With the teacher's logits of the same rows in a chunk beside."""

    def run_step(
        self,
        logits: Tensor,
        head: int,
        rows: Index,
        results: Rows,
        incoming: Rows | None,
        lost: Slot,
        beyond: Slot,
        exactly: bool,
    ) -> int:
        assert isinstance(self.call, DistillCall)
        teacher = self.teacher(rows, exactly)
        target = None if self.target is None else self.targets(head, rows)
        if not on_host(self.input):
            steps.distill(self.call, logits, teacher.values, target, results, incoming)
            return 0
        student = kernel.Logits(logits, lost, self.bias)
        given = (self.call, student, teacher, target, results, incoming)
        own, theirs, *_ = (self.ordinary(rounds) for rounds in (*self.rounds, False))
        return kernel.distill(*given, ordinary=own, teacher_ordinary=theirs, beyond=beyond)

    def teacher(self, rows: Index, exactly: bool) -> kernel.Logits:
        """The teacher's logits of some rows."""
        input, weight, bias, logits = self.tensors[7:]
        if logits is not None:
            return kernel.Logits(logits[rows])
        assert input is not None and weight is not None
        if not hasattr(self, "product"):
            self.product = self.products(weight[:, 0], bias)
            self.teachers_bias = self.added(bias)
            shape, dtype = (self.plan.rows, self.classes), self.product.chunk_dtype
            self.other = torch.empty(shape, dtype=dtype, device=input.device)
            kernel.advise_huge_pages(self.other)
        x = self.product.rows(input[rows])
        out = self.other[: x.shape[0]]
        self.product.logits(x, out)
        lost = self.product.lost(x, out) if exactly and isinstance(self.product, Native) else None
        return kernel.Logits(out, lost, self.teachers_bias)
