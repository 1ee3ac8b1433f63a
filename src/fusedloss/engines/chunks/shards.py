"""The loop of a process that has but a shard of the classes, and those of logits that are there.

    logits = x W^T -> gather: sums of each row -> all_gather, merge -> finish: losses, and the logits become g

What goes to the others of the group is eight numbers a row; of two heads twelve, then two, and two more
where a divergence is small. Each merges what all gathered in the order of their ranks, so that all have the
same bits; whether and when they exchange something depends on nothing that only one of them knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.reduce import exact, wide
from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall, Rows, Slot, Slots
from .. import abi
from ..cpu import linear as kernel
from . import divergence, steps
from .chunked import DistillLoop, Index, Loop, some
from .plan import AGAIN, Plan, on_host, plan
from .products import Direct, Native


class Pair(NamedTuple):
    """The logits of some rows of two heads, and their labels."""

    student: kernel.Logits
    teacher: kernel.Logits
    target: Slot


class GroupLoop(Loop):
    """Whether anything is exchanged depends on what any process needs, and not on what this one does."""

    def __init__(
        self,
        call: LinearCall,
        tensors: Slots,
        needed: Sequence[bool],
        incoming: Sequence[Slot] | None,
        sums: Slot,
    ) -> None:
        assert call.shard is not None
        self.shard, own = call.shard, (*needed, *(False,) * 4)[:4]
        others = call.shard.needed if call.stores_gradients else ()
        self.asked, self.differentiates = own, any(own) or any(others)
        self.adds = self.shard.adds and call.family != "logits"
        takes_part = own[0] or (self.adds and any(others[:1]))
        super().__init__(call, tensors, (takes_part, *own[1:]), incoming)
        if self.differentiates and self.incoming is None:
            self.incoming = self.incoming_rows(incoming)
        self.given: Slot = None if incoming is None else sums
        self.merged: Slot = sums if incoming is None else None

    def close(self) -> None:
        if self.grads[0] is not None and self.adds:
            self.shard.all_reduce(self.grads[0])
        pairs = zip(self.grads, self.asked, strict=True)
        self.grads = [grad if asked else None for grad, asked in pairs]


class ShardLoop(GroupLoop):
    """Of a linear head."""

    def planned(self, differentiate: bool) -> Plan:
        return plan(self.call, self.input, max(self.shard.sizes), self.differentiates)

    def kept(self, head: int) -> Slot:
        if self.merged is not None and self.call.probabilities:
            return None  # backward may need the sums of all
        return super().kept(head)

    def evaluate(self, product: Direct, head: int, rows: Index, n: int) -> None:
        x, sums = product.rows(self.input[rows]), self.empty_sums(n)
        for first in range(0, max(self.classes, 1), self.plan.classes):
            logits = self.matrix(n, min(self.plan.classes, self.classes - first))
            product.logits(x, logits, first)
            lost = product.lost(x, logits, first) if isinstance(product, Native) else None
            bias = None if self.bias is None else self.bias[first:]
            self.gather(kernel.Logits(logits, lost, bias), head, rows, sums, first)
        sums = self.of_all(sums, head, rows)
        self.finish(kernel.Logits(self.matrix(n, 0)), head, rows, sums)

    def differentiate(self, product: Direct, head: int, rows: Index, n: int, add: bool) -> None:
        x, g = product.rows(self.input[rows]), self.matrix(n, self.classes)
        product.logits(x, g)
        own, beyond = kernel.Logits(g, bias=self.bias), None
        if self.rounds[0]:
            beyond = torch.empty(n, dtype=torch.int64)
        if self.given is None:
            sums = self.empty_sums(n)
            if self.gather(own, head, rows, sums, beyond=beyond) > 0:
                for part, logits in self.exactly(product, x, g, beyond):
                    again = self.empty_sums(len(part))
                    self.gather(logits, head, some(rows, part), again)
                    sums[part] = again
            sums = self.of_all(sums, head, rows)
        else:
            sums = self.given[:, head][rows].contiguous()
            if beyond is not None:  # they are of exact logits
                beyond.fill_(1)
        self.finish(own, head, rows, sums, beyond)
        for part, logits in self.exactly(product, x, g, beyond):
            self.finish(logits, head, some(rows, part), sums[part])
            g[part] = logits.values
        self.multiply(product, x, g, head, rows, add)

    def exactly(
        self, product: Direct, x: Tensor, g: Tensor, beyond: Slot
    ) -> Iterator[tuple[Tensor, kernel.Logits]]:
        """The rows of which the roundings count, part by part, with what these took from their logits."""
        if beyond is None or not beyond.any():
            return
        for part in beyond.nonzero().squeeze(1).split(-(-len(beyond) // AGAIN)):
            logits = g[part]
            lost = self.lost(product, x[part], logits)
            yield part, kernel.Logits(logits, lost, self.bias)

    def empty_sums(self, n: int) -> Tensor:
        return self.input.new_empty(n, abi.LINEAR_SUMS, dtype=exact(self.input))

    def gather(
        self,
        logits: kernel.Logits,
        head: int,
        rows: Index,
        sums: Tensor,
        first: int = 0,
        beyond: Slot = None,
    ) -> int:
        """The sums of some rows over some of this process's classes; how many rows are `beyond`."""
        target = self.targets(head, rows)
        if not on_host(self.input):
            sums.copy_(steps.gather(self.call, logits.values, target, self.weight))
            return 0
        shard, results = self.shard, self.results.each(lambda t: t[:, head][rows])
        stretch = kernel.Stretch(shard.first + first, shard.classes, first == 0, False, shard.first)
        given = (self.call, logits, target, self.weight, results)
        ordinary = self.ordinary(self.rounds[0])
        return kernel.step(*given, stretch=stretch, sums=sums, ordinary=ordinary, beyond=beyond)

    def of_all(self, sums: Tensor, head: int, rows: Index) -> Tensor:
        """Of the sums over this process's classes those over all."""
        parts = self.shard.all_gather(sums)
        merge = kernel.merge if on_host(self.input) else steps.merge
        found = merge(self.call, parts)
        if self.merged is not None:
            self.merged[:, head][rows] = found
        return found

    def finish(
        self, logits: kernel.Logits, head: int, rows: Index, sums: Tensor, beyond: Slot = None
    ) -> None:
        """The results of some rows; the logits become their gradient."""
        results = self.results.each(lambda t: t[:, head][rows])
        incoming: Rows | None = None
        if self.incoming is not None:
            incoming = self.incoming.each(lambda t: t[:, head][rows])
        grad_target, target = self.grads[3], self.targets(head, rows)
        part = None if grad_target is None else grad_target[:, :, head][rows]
        given = (target, self.weight, results, incoming, part)
        if on_host(self.input):
            first, classes = self.shard.first, self.shard.classes
            stretch = kernel.Stretch(first, classes, False, True, first, True)
            kernel.step(self.call, logits, *given, stretch=stretch, sums=sums, beyond=beyond)
        else:
            steps.finish(self.call, logits.values, *given, sums)
        if grad_target is not None and part is not None and not isinstance(rows, slice):
            grad_target[:, :, head][rows] = part
        self.keep(results, head, rows)


class Copied(Direct):
    """Logits that are there already."""

    def logits(self, x: Tensor, out: Tensor, first: int = 0) -> None:
        out.copy_(x[:, first : first + out.shape[1]])

    def grad_input(self, g: Tensor, out: Tensor) -> None:
        if out.data_ptr() != g.data_ptr():
            out.copy_(g)


class LogitsLoop(ShardLoop):
    """Of logits: the input's copy is the chunk and, where all rows count, the gradient."""

    place: Slot = None  # of the gradient of the chunk

    def planned(self, differentiate: bool) -> Plan:
        return plan(self.call, self.input[:, :0], max(self.shard.sizes), self.differentiates)

    def products(self, weight: Tensor, bias: Slot, head: int = 0) -> Direct:
        self.rounds = [False]
        product = Copied(weight, None)
        product.chunk_dtype = wide(self.input)
        return product

    def differentiate(self, product: Direct, head: int, rows: Index, n: int, add: bool) -> None:
        grad = self.grads[0]
        self.place = grad[rows] if grad is not None and isinstance(rows, slice) else None
        super().differentiate(product, head, rows, n, add)

    def matrix(self, n: int, columns: int) -> Tensor:
        return super().matrix(n, columns) if self.place is None else self.place


class DivergenceLoop(GroupLoop, DistillLoop):
    """Of two heads, whose logits stay on their process, too."""

    def planned(self, differentiate: bool) -> Plan:
        return plan(self.call, self.input, max(self.shard.sizes), self.differentiates)

    def differentiate(self, product: Direct, head: int, rows: Index, n: int, add: bool) -> None:
        x, g = product.rows(self.input[rows]), self.matrix(n, self.classes)
        product.logits(x, g)
        target = None if self.target is None else self.targets(head, rows)
        pair = Pair(kernel.Logits(g, None, self.bias), self.teacher(rows, False), target)
        if self.given is None:
            pair, own = self.gather(product, x, pair, rows)
            sums = self.of_all(pair, own)
            if self.merged is not None:
                self.merged[:, head][rows] = sums
        else:
            sums = self.given[:, head][rows].contiguous()
            if any(self.rounds):  # they are of exact logits
                pair = self.exactly(product, x, pair, rows)
        results = self.results.each(lambda t: t[:, head][rows])
        incoming = self.incoming and self.incoming.each(lambda t: t[:, head][rows])
        self.phase("FINISH", pair, sums, results, incoming)
        self.keep(results, head, rows)
        self.multiply(product, x, g, head, rows, add)

    def gather(self, product: Direct, x: Tensor, pair: Pair, rows: Index) -> tuple[Pair, Tensor]:
        """The sums of both softmaxes over this process's classes, and the logits that they are of."""
        n = x.shape[0]
        sums = x.new_empty(n, self.call.sums, dtype=exact(self.input))
        beyond = torch.empty(n, dtype=torch.int64) if any(self.rounds) else None
        if self.phase("GATHER", pair, sums, beyond=beyond) > 0:
            pair = self.exactly(product, x, pair, rows)
            self.phase("GATHER", pair, sums)
        return pair, sums

    def exactly(self, product: Direct, x: Tensor, pair: Pair, rows: Index) -> Pair:
        """With what rounding took from the logits."""
        student, teacher, target = pair
        student = student._replace(lost=self.lost(product, x, student.values))
        if (input := self.tensors[7]) is not None:
            lost = self.lost(self.product, self.product.rows(input[rows]), teacher.values)
            teacher = teacher._replace(lost=lost)
        return Pair(student, teacher, target)

    def of_all(self, pair: Pair, own: Tensor) -> Tensor:
        """Of the sums over this process's classes those over all."""
        assert isinstance(self.call, DistillCall)
        merge = kernel.merge if on_host(self.input) else divergence.merge
        sums = merge(self.call, self.shard.all_gather(own[:, : abi.SOFTMAX_SUMS]))
        self.phase("COMPARE", pair, sums)
        self.add_up(sums[:, abi.SOFTMAX_SUMS : abi.SMALL_SUMS])
        small = torch.empty(len(sums), dtype=torch.int64) if on_host(self.input) else None
        # All processes find the same.
        if self.phase("REFINE", pair, sums, beyond=small) > 0:
            self.add_up(sums[:, abi.SMALL_SUMS :])
        return sums

    def add_up(self, part: Tensor) -> None:
        """In the order of the ranks, in place."""
        total, *rest = self.shard.all_gather(part)
        for each in rest:
            total += each
        part.copy_(total)

    def phase(
        self,
        phase: str,
        pair: Pair,
        sums: Tensor,
        results: Rows | None = None,
        incoming: Rows | None = None,
        beyond: Slot = None,
    ) -> int:
        """A step of theirs; how many rows are `beyond`."""
        assert isinstance(self.call, DistillCall)
        if not on_host(self.input):
            x, t = pair.student.values, pair.teacher.values
            return divergence.step(phase, self.call, x, t, pair.target, sums, results, incoming)
        own, theirs, *_ = (self.ordinary(rounds) for rounds in (*self.rounds, False))
        return kernel.distill(
            *(self.call, *pair, results, incoming, own, theirs, beyond),
            phase=phase,
            first=self.shard.first,
            sums=sums,
        )
