"""The steps of a shard's rows of two heads by torch operations, where there is no kernel (csrc/distill.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.reduce import wide
from ...kinds.distill import DistillCall, Softmax, divergence, log_ratios, to_mixture
from ...kinds.heads import Rows, Slot, capped
from ..abi import DIVERGENCE_SUMS

# What is known of a row, as csrc/distill.h has it; exps are not raised here.
STUDENT, TEACHER = slice(0, 4), slice(4, 8)
MAX, OTHERS, OWN, TOP = range(4)  # of each
AT, HARD_OTHERS, HARD_OWN, HARD_X, FORWARD, MEAN, SMALL_FORWARD, SMALL_REVERSE = range(8, 16)


def step(
    phase: str,
    call: DistillCall,
    logits: Tensor,
    teacher: Tensor,
    target: Slot,
    first: int,
    sums: Tensor,
    results: Rows | None,
    incoming: Rows | None,
) -> int:
    """A phase of a chunk (n, C) of the shard whose class `first` is."""
    x = capped(logits.to(wide(logits)), call.softcap)
    t = capped(teacher.to(x.dtype), call.teacher_softcap)
    label = None if target is None else _Label(call, target, first, x.shape[1])
    if phase == "GATHER":
        _gather(call, x, t, label, first, sums)
        return 0
    row = _Row(call, x, t, sums)
    if phase == "COMPARE":
        sums[:, FORWARD], sums[:, MEAN] = row.products()
    elif phase == "REFINE":
        sums[:, SMALL_FORWARD], sums[:, SMALL_REVERSE] = row.small_products()
        return 1  # to ask whether any is small would stop a queue
    else:
        assert results is not None
        losses = call.soft_weight * row.divergence()
        if label is not None:
            losses = losses + call.hard_weight * _hard_loss(sums)
            losses = torch.where(label.counted, losses, 0)
        results.loss.copy_(losses)
        if incoming is not None and x.shape[1]:
            g = row.slope(first, incoming.loss)
            if label is not None:
                g = g + label.slope(x, sums, call.hard_weight * incoming.loss)
            if call.softcap:
                g = g * ((1 - x / call.softcap) * (1 + x / call.softcap))
            logits.copy_(g if label is None else torch.where(label.counted.unsqueeze(1), g, 0))
    return 0


def merge(call: DistillCall, parts: Tensor) -> Tensor:
    """Of the first sums (k, n, 12) of k processes those of all, with place for the rest."""
    found = parts.new_zeros(parts.shape[1], DIVERGENCE_SUMS)
    for which in (STUDENT, TEACHER):
        own = parts[..., which]
        first = own[..., MAX].argmax(0, keepdim=True)  # the first process that has the largest
        largest = own[..., MAX].gather(0, first)
        factors = _factors(own[..., MAX], largest, 1 / call.temperature)
        is_first = torch.zeros_like(factors, dtype=torch.bool).scatter_(0, first, True)
        others = own[..., OTHERS] + torch.where(is_first, 0, own[..., OWN])
        columns = found[:, which]
        columns[:, MAX] = largest[0]
        columns[:, OTHERS] = (factors * others).sum(0)
        columns[:, OWN] = own[..., OWN].gather(0, first)[0]
        columns[:, TOP] = own[..., TOP].gather(0, first)[0]
        if which is STUDENT:
            found[:, AT] = parts[..., AT].gather(0, first)[0]
            once = _factors(own[..., MAX], largest, 1.0)
    found[:, HARD_OTHERS] = (once * parts[..., HARD_OTHERS]).sum(0)
    found[:, HARD_OWN] = (once * parts[..., HARD_OWN]).sum(0)
    found[:, HARD_X] = parts[..., HARD_X].sum(0)
    return found


def _factors(maxima: Tensor, largest: Tensor, by: float) -> Tensor:
    """What sums relative to these maxima are multiplied by."""
    return torch.where(maxima == largest, 1, ((maxima - largest) * by).exp())


class _Label:
    """Which of the shard's classes is each row's, and whether one is."""

    def __init__(self, call: DistillCall, target: Tensor, first: int, classes: int) -> None:
        at, self.counted = target - first, target != call.ignore_index
        self.here = self.counted & (at >= 0) & (at < classes)
        self.at = at.clamp(0, max(classes - 1, 0)).unsqueeze(1)

    def own(self, values: Tensor) -> Tensor:
        return torch.where(self.here, values.gather(1, self.at).squeeze(1), 0)

    def slope(self, x: Tensor, sums: Tensor, scale: Tensor) -> Tensor:
        """By the hard term."""
        total = sums[:, HARD_OTHERS] + sums[:, HARD_OWN]
        p = (x - _origin(sums[:, STUDENT], x)).exp() * (scale / total).unsqueeze(1).to(x.dtype)
        own = (-scale * sums[:, HARD_OTHERS] / total).unsqueeze(1).to(x.dtype)
        return p.scatter(1, self.at, torch.where(self.here.unsqueeze(1), own, p.gather(1, self.at)))


def _gather(
    call: DistillCall, x: Tensor, t: Tensor, label: _Label | None, first: int, sums: Tensor
) -> None:
    sums.zero_()
    if not x.shape[1]:
        sums[:, MAX] = sums[:, 4 + MAX] = -math.inf
        sums[:, TOP] = sums[:, 4 + TOP] = -1
        return
    for each, which in ((x, STUDENT), (t, TEACHER)):
        columns, (top, at) = sums[:, which], each.max(1, keepdim=True)
        columns[:, MAX] = top.squeeze(1)
        e = ((each - _origin(columns, each)) / call.temperature).exp()
        columns[:, OWN] = torch.where(top == -math.inf, 0, e.gather(1, at)).squeeze(1)
        columns[:, OTHERS] = e.scatter(1, at, 0).sum(1, dtype=sums.dtype)
        columns[:, TOP] = (at + first).squeeze(1)
        if which is STUDENT:
            sums[:, AT] = t.gather(1, at).squeeze(1)
    if label is None:
        return
    e = (x - _origin(sums[:, STUDENT], x)).exp()
    sums[:, HARD_OWN], sums[:, HARD_X] = label.own(e), label.own(x)
    rest = e.scatter(
        1, label.at, torch.where(label.here, 0, e.gather(1, label.at).squeeze(1)).unsqueeze(1)
    )
    sums[:, HARD_OTHERS] = rest.sum(1, dtype=sums.dtype)


class _Row:
    """What each row's divergence is made of, from its logits and what is known of all of them."""

    def __init__(self, call: DistillCall, x: Tensor, t: Tensor, sums: Tensor) -> None:
        self.call, self.sums, self.kind = call, sums, call.divergence
        at = sums[:, AT : AT + 1].to(x.dtype)
        ours, theirs = _softmax(call, x, sums[:, STUDENT]), _softmax(call, t, sums[:, TEACHER])
        top = _softmax(call, sums[:, :1].to(x.dtype), sums[:, STUDENT])
        d, own = log_ratios(ours, theirs), log_ratios(top, _softmax(call, at, sums[:, TEACHER]))
        self.p, self.q, self.d = ours.p, theirs.p, d
        self.to_teacher, self.to_student, self.own, self.own_gap = d, -d, -own, -own
        if self.kind == "js":
            self.to_teacher, self.unshifted, self.to_student = to_mixture(d, own, call.beta)
            _, self.own, self.own_gap = to_mixture(own, own, call.beta)
        else:
            self.unshifted = self.to_student
        self.own, self.own_gap = (torch.where(g.isfinite(), g, 0) for g in (self.own, self.own_gap))

    def products(self) -> tuple[Tensor, Tensor]:
        """The sums weighted by the teacher's probabilities, and by the student's."""
        exact = self.sums.dtype
        forward = torch.where(self.q == 0, 0, self.q * self.to_teacher).sum(1, dtype=exact)
        beyond = self.p * (self.to_student - self.own_gap)
        return forward, torch.where(self.p == 0, 0, beyond).sum(1, dtype=exact)

    def small_products(self) -> tuple[Tensor, Tensor]:
        """The same by terms none of which is negative."""
        p, q, beta = self.p, self.q, self.call.beta
        if self.kind == "js":
            m = beta * q + (1 - beta) * p
            return divergence(q, m, self.to_teacher), divergence(p, m, self.unshifted)
        return divergence(q, p, self.d), divergence(p, q, -self.d)

    def divergence(self) -> Tensor:
        sums = self.sums
        exact = self.together(sums[:, SMALL_FORWARD], sums[:, SMALL_REVERSE])
        own = self.own.squeeze(1).to(sums.dtype)
        return torch.where(
            exact.isfinite(), exact, self.together(sums[:, FORWARD], sums[:, MEAN] + own)
        )

    def together(self, forward: Tensor, reverse: Tensor) -> Tensor:
        if self.kind == "js":
            return self.call.beta * forward + (1 - self.call.beta) * reverse
        return forward if self.kind == "forward" else reverse

    def slope(self, first: int, incoming: Tensor) -> Tensor:
        """By the logits."""
        p, q, d, call = self.p, self.q, self.d, self.call
        if self.kind == "forward":
            slope = torch.where(d > 0, q, -p) * torch.expm1(-d.abs())
            slope = torch.where((p == 0) & (q == 0), 0, slope)
        else:
            mean = self.sums[:, MEAN : MEAN + 1].to(p.dtype)
            slope = p * (self.to_student - (self.own_gap + mean))
            classes = torch.arange(first, first + p.shape[1], device=p.device)
            is_top = classes == self.sums[:, TOP : TOP + 1]
            slope = torch.where(is_top, -p * mean, torch.where(p == 0, 0, slope))
        scale = incoming * call.soft_weight / call.temperature
        if self.kind == "js":
            scale = scale * (1 - call.beta)
        return slope * scale.unsqueeze(1).to(p.dtype)


def _softmax(call: DistillCall, x: Tensor, sums: Tensor) -> Softmax:
    """Of some logits, from what is known of all."""
    gaps = (x - _origin(sums, x)) / call.temperature
    # Where no class is finite, or one is infinite, the largest has no exp of 1.
    others = torch.where(sums[:, OWN] == 1, sums[:, OTHERS], math.nan).unsqueeze(1).to(x.dtype)
    return Softmax(gaps, others, gaps.exp() / (1 + others), sums[:, TOP : TOP + 1])


def _origin(sums: Tensor, x: Tensor) -> Tensor:
    top = sums[:, MAX : MAX + 1]
    return torch.where(top == -math.inf, 0, top).to(x.dtype)


def _hard_loss(sums: Tensor) -> Tensor:
    total, own = sums[:, HARD_OTHERS] + sums[:, HARD_OWN], sums[:, HARD_OWN]
    log_sum = torch.where(own == 1, torch.log1p(sums[:, HARD_OTHERS]), total.log())
    return log_sum + torch.where(own == 1, 0, sums[:, MAX] - sums[:, HARD_X])
