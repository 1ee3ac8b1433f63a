"""A head whose logits are one chunk: product, row step, products. What that takes is laid out once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.reduce import wide
from ...core.torch_state import any_autocast, empty_on_cpu
from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall, Rows, Slot, Slots
from .. import abi
from ..cpu import linear as kernel
from ..cpu.kept import Kept
from ..cpu.load import DTYPES, FLOATS
from .plan import AGAIN, ORDINARY, on_host, plan
from .products import (
    HALVES,
    LARGE,
    NARROWEST_TILE,
    TILE_BYTES,
    multiplied,
    multiplies,
    rounded_away,
)

ROW_WORDS = (
    6  # of scratch: label, place, share, scale, loss, and whether it is beyond what is ordinary
)
FEW, ONE = torch.float64, (1,)


class Straight:
    """Calls of the same shapes, types and settings, of one head. Nothing here depends on what tensors hold.

    The tensors are those of `kinds/heads.py`, or as their caller shaped them.
    """

    def __init__(
        self,
        call: LinearCall,
        tensors: Slots,
        needed: Sequence[bool] = (),
        incoming: Slot = None,
        sign: float = 1.0,  # of the result
    ) -> None:
        input, linear_weight, _, target, weight, *_ = tensors
        assert input is not None and linear_weight is not None
        self.call, self.needed, dtype = call, (*needed, False, False, False)[:3], input.dtype
        self.features, self.classes = input.shape[-1], linear_weight.shape[0]
        self.n = n = input.numel() // self.features
        self.reduced = call.reduction != "none"
        self.shape = torch.Size() if self.reduced else input.shape[:-1]
        self.wide, self.half = wide(input), dtype in HALVES
        rounds = multiplies(dtype)
        self.widens, self.distills = self.half and not rounds, isinstance(call, DistillCall)
        differentiates = any(self.needed)
        self.exact = rounds and (call.exact_logits or not differentiates)
        self.watches = rounds and not self.exact
        places = (("label", 3), ("weight", 4), ("share", 5))
        here = [(name, k, t) for name, k in places if (t := tensors[k]) is not None]
        self.read = [k for _, k, _ in here]
        types = {name: (0, DTYPES[t.dtype]) for name, _, t in here}
        if incoming is not None:
            types["incoming"] = (0, DTYPES[incoming.dtype])
        self.rows = Kept(
            *("head_rows", call.loss, [*types, "rows"]),
            {
                "n": n,
                "classes": self.classes,
                "ignore_index": call.ignore_index,
                "divide": call.reduction == "mean",
                "sign": sign,
                "incoming_stride": incoming is not None and incoming.numel() == n,
                **types,
            },
        )
        self.step = self.laid_out(tensors, target, weight, differentiates)
        self.results = Kept(
            *("head_results", call.loss, ("rows", "out")),
            {
                "n": n,
                "count": n,
                "reduced": self.reduced,
                "sign": sign,
                "out": (0, DTYPES[call.dtype]),
            },
        )
        self.empty = tuple(self.shape), layout(self.shape), call.dtype
        self.words = (abi.HEAD_WORDS * n + 1,)
        size = max(n * self.classes, (n + self.classes) * self.features)
        self.multiply = torch.mm if size < LARGE else multiplied

    def laid_out(self, tensors: Slots, target: Slot, weight: Slot, differentiates: bool) -> Kept:
        """The row step."""
        call, bias = self.call, tensors[2]
        logits = self.laid_out_logits(self.wide if self.widens else tensors[0].dtype)  # type: ignore[union-attr]
        common = {
            "n": self.n,
            "c": self.classes,
            "differentiate": differentiates,
            "softcap": call.softcap,
            "ordinary": ORDINARY,
        }
        own = ["label"] * (target is not None)
        last = [*["incoming"] * differentiates, "loss", *["beyond"] * self.watches]
        own_words = [*[3] * differentiates, 4, *[5] * self.watches]
        self.places = [8 * self.n * k for k in own_words]
        if not isinstance(call, DistillCall):
            numbers = {
                **common,
                "columns": self.classes,
                "finish": True,
                "smoothing": call.smoothing,
                "z_loss": call.z_loss,
                "logit_scale": call.logit_scale,
                "logits": logits,
            }
            names = [*self.parts("logits", bias), *own, *["weight"] * (weight is not None), *last]
            return Kept("linear", call.loss, names, numbers)
        teachers = tensors[10]
        theirs = logits if teachers is None else self.laid_out_logits(teachers.dtype)
        numbers = {
            **common,
            **kernel.of_divergence(call),
            "student": logits,
            "teacher": theirs,
            "teacher_ordinary": ORDINARY if teachers is None else math.inf,
        }
        others = ["teacher.data"] if teachers is not None else self.parts("teacher", tensors[9])
        return Kept(
            "distill", call.loss, [*self.parts("student", bias), *others, *own, *last], numbers
        )

    def laid_out_logits(self, dtype: torch.dtype) -> tuple[int, ...]:
        return 0, 0, 0, DTYPES[dtype], self.classes

    def parts(self, of: str, bias: Slot) -> list[str]:
        """The pointers to logits."""
        return [f"{of}.data", *[f"{of}.low"] * self.exact, *[f"{of}.bias"] * (bias is not None)]

    def __call__(self, tensors: Slots, incoming: Slot = None) -> tuple[Tensor, Sequence[Tensor]]:
        """The result, and the gradients that are needed; half types' may be of float32.

        Where a gradient is incoming nothing is written to the result.

        Raises:
            IndexError: a class index out of range.
        """
        input, w, bias, target, weight, _ = tensors[:6]
        assert input is not None and w is not None
        n, call = self.n, self.call
        multiply = multiplied if any_autocast() else self.multiply
        rows = empty_on_cpu(self.words, ONE, FEW)
        start, index, count = rows.data_ptr(), None, n
        pointers = [tensors[k].data_ptr() for k in self.read]  # type: ignore[union-attr]
        if incoming is not None:
            pointers.append(incoming.data_ptr())
        found = self.rows(*pointers, start)
        if found != abi.FINE:
            if found >= 0:
                call.check(tensors, target)  # it raises
            count = abi.SOME - found
            index = rows.view(torch.int64)[n : n + count]
        x = input if input.dim() == 2 else input.view(n, self.features)
        if w.dim() != 2:
            w = w.view(self.classes, self.features)
        if index is not None:
            x = x.index_select(0, index)
        if self.widens:
            x, w = x.float(), w.float()
        g = multiply(x, w.t())
        pointers = [g.data_ptr()]
        if self.exact:
            lost = rounded_away(x, w, g)
            pointers.append(lost.data_ptr())
        if bias is not None:
            bias = bias if bias.dtype is self.wide else bias.to(self.wide)
            pointers.append(bias.data_ptr())
        teacher: Slots = ()
        if self.distills:
            teacher = self.teacher(tensors[7:], index)
            pointers += [t.data_ptr() for t in teacher[2:] if t is not None]
        if target is not None:
            pointers.append(start)
        if weight is not None:
            weight = weight if weight.dtype is self.wide else weight.to(self.wide)
            pointers.append(weight.data_ptr())
        pointers += [start + k for k in self.places]
        more = self.step(*pointers) if count == n else self.step.of(count, 0, *pointers)
        if more > 0:
            self.step_exactly(rows, count, (x, w, g, bias, weight), teacher, target is not None)
        result = empty_on_cpu(*self.empty)
        if incoming is None:
            if count == n:
                self.results(start, result.data_ptr())
            else:
                self.results.of(count, 1, start, result.data_ptr())
        grads: list[Tensor] = []
        of_input, of_weight, of_bias = self.needed
        if of_input:
            grad = multiply(g, w)
            if index is not None:
                whole = grad.new_zeros(n, self.features)
                grad = whole.index_copy_(0, index, grad)
            grads.append(grad if input.dim() == 2 else grad.view(input.shape))
        if of_weight:
            grads.append(multiply(g.t(), x))
        if of_bias:
            grads.append(g.sum(0, dtype=self.wide))
        return result, grads

    def teacher(self, tensors: Slots, index: Slot) -> Slots:
        """Of a teacher: input, weight, logits, what rounding took from them, bias."""
        input, w, bias, logits = tensors
        if logits is not None:
            logits = logits.view(self.n, self.classes)
            return (
                None,
                None,
                logits if index is None else logits.index_select(0, index),
                None,
                None,
            )
        assert input is not None and w is not None
        x, w = input.view(self.n, -1), w.view(self.classes, -1)
        if index is not None:
            x = x.index_select(0, index)
        if self.widens:
            x, w = x.float(), w.float()
        logits = multiplied(x, w.t())
        lost = rounded_away(x, w, logits) if self.exact else None
        return x, w, logits, lost, None if bias is None else bias.to(self.wide).view(-1)

    def step_exactly(
        self,
        rows: Tensor,
        count: int,
        head: tuple[Tensor, Tensor, Tensor, Slot, Slot],
        teacher: Slots,
        labelled: bool,
    ) -> None:
        """Once more for the rows of which the roundings count, with what these took from their logits."""
        x, w, g, bias, weight = head
        n, words = self.n, rows.view(torch.int64)
        labels, scale, losses = words[:count], rows[3 * n :], rows[4 * n :]
        beyond = words[5 * n : 5 * n + count].nonzero().squeeze(1)
        for part in beyond.split(-(-count // AGAIN)):
            logits = g[part]
            own = kernel.Logits(logits, rounded_away(x[part], w, logits), bias)
            results = Rows(torch.empty(len(part), dtype=FEW))
            target, arriving = labels[part] if labelled else None, Rows(scale[part])
            if isinstance(self.call, DistillCall):
                of_teacher = exactly(teacher, part)
                kernel.distill(self.call, own, of_teacher, target, results, arriving)
            else:
                assert target is not None
                kernel.step(self.call, own, target, weight, results, arriving)
            g[part] = logits
            losses[part] = results.loss


def exactly(teacher: Slots, part: Tensor) -> kernel.Logits:
    """The teacher's logits of some rows, with what rounding took from them."""
    x, w, logits, _, bias = teacher
    assert logits is not None
    own = logits[part]
    lost = None if x is None or w is None else rounded_away(x[part], w, own)
    return kernel.Logits(own, lost, bias)


def straight(call: LinearCall, tensors: Slots, needed: Sequence[bool], incoming: Slot) -> bool:
    """Whether the logits of the call are one chunk, and its tensors as `Straight` takes them."""
    input, linear_weight, bias, target, weight, share, denominator, *teacher = tensors
    assert input is not None and linear_weight is not None
    classes, features = linear_weight.shape[0], input.shape[-1]
    if (
        call.probabilities
        or call.statistics
        or call.shard is not None
        or denominator is not None
        or linear_weight.numel() != classes * features
        or not on_host(input)
        or any(t is not None and t.dtype is not input.dtype for t in teacher[:1])
        or not all(map(lies_flat, (bias, target, weight, share, incoming, *teacher)))
        or not (input.numel() and linear_weight.numel())
        or any(t is not None and t.dtype not in FLOATS for t in (weight, share, incoming))
        or (target is not None and target.dtype not in DTYPES)
    ):
        return False
    if input.dtype in HALVES and not multiplies(input.dtype):
        # A larger weight is widened in tiles.
        for t in (linear_weight, *teacher[1:2]):
            if t is not None and t.numel() > max(NARROWEST_TILE * t.shape[-1], TILE_BYTES // 4):
                return False
    rows = input.numel() // features
    found = plan(call, input.reshape(rows, features), classes, any(needed))
    return found.rows >= rows and found.classes >= classes


def layout(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def lies_flat(tensor: Slot) -> bool:
    return tensor is None or tensor.is_contiguous()
