"""The steps of a shard's rows of two heads by torch operations, where there is no kernel (csrc/distill.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kinds.distill import DistillCall, Softmax, divergence, log_ratios, to_mixture
from ...kinds.heads import Rows, Slot, capped
from . import steps

# What is known of a row, as csrc/distill.h has it; exps are not raised here.
STUDENT, TEACHER = slice(0, 4), slice(4, 8)
MAX, OTHERS, OWN, TOP = range(4)  # of each
AT, HARD = 8, slice(9, 12)  # the others, the own class, its logit
FORWARD, MEAN, SMALL_FORWARD, SMALL_REVERSE = range(12, 16)


def step(
    phase: str,
    call: DistillCall,
    logits: Tensor,
    teacher: Tensor,
    target: Slot,
    sums: Tensor,
    results: Rows | None,
    incoming: Rows | None,
) -> int:
    """A phase of a chunk (n, C) of the call's shard."""
    x = steps.logits_of(call, logits)
    t = capped(teacher.to(x.dtype), call.teacher_softcap)
    if phase == "GATHER":
        sums.zero_()
        _gather(call, x, t, sums)
        if target is not None:
            hard = steps.gather(call, logits, target, None)
            sums[:, HARD] = hard[:, [steps.OTHERS, steps.OWN, steps.OWN_X]]
        return 0
    row = _Row(call, x, t, sums)
    if phase == "COMPARE":
        sums[:, FORWARD], sums[:, MEAN] = row.products()
    elif phase == "REFINE":
        sums[:, SMALL_FORWARD], sums[:, SMALL_REVERSE] = row.small_products()
        return 1  # to ask whether any is small would stop a queue
    else:
        assert results is not None
        _finish(call, logits, x, row, target, sums, results, incoming)
    return 0


def _finish(
    call: DistillCall,
    logits: Tensor,
    x: Tensor,
    row: _Row,
    target: Slot,
    sums: Tensor,
    results: Rows,
    incoming: Rows | None,
) -> None:
    losses, counted = call.soft_weight * row.divergence(), call.counted(target)
    if target is not None:
        losses = losses + call.hard_weight * _hard_loss(sums)
    results.loss.copy_(losses if counted is None else torch.where(counted, losses, 0))
    if incoming is None or not x.shape[1]:
        return
    g = row.slope(incoming.loss)
    if target is not None:
        g = g + _hard_slope(call, x, target, sums, call.hard_weight * incoming.loss)
    if call.softcap:
        g = g * ((1 - x / call.softcap) * (1 + x / call.softcap))
    logits.copy_(g if counted is None else torch.where(counted.unsqueeze(1), g, 0))


def merge(call: DistillCall, parts: Tensor) -> Tensor:
    """Of the first sums (k, n, 12) of k processes those of all, with place for the rest."""
    found = parts.new_zeros(parts.shape[1], call.sums)
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
    others, at_label, logit = parts[..., HARD].unbind(2)
    found[:, HARD] = torch.stack([once * others, once * at_label, logit], 2).sum(0)
    return found


def _factors(maxima: Tensor, largest: Tensor, by: float) -> Tensor:
    """What sums relative to these maxima are multiplied by."""
    return torch.where(maxima == largest, 1, ((maxima - largest) * by).exp())


def _gather(call: DistillCall, x: Tensor, t: Tensor, sums: Tensor) -> None:
    """Of both softmaxes."""
    assert call.shard is not None
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
        columns[:, TOP] = (at + call.shard.first).squeeze(1)
        if which is STUDENT:
            sums[:, AT] = t.gather(1, at).squeeze(1)


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

    def slope(self, incoming: Tensor) -> Tensor:
        """By the logits."""
        p, q, d, call = self.p, self.q, self.d, self.call
        assert call.shard is not None
        if self.kind == "forward":
            slope = torch.where(d > 0, q, -p) * torch.expm1(-d.abs())
            slope = torch.where((p == 0) & (q == 0), 0, slope)
        else:
            mean = self.sums[:, MEAN : MEAN + 1].to(p.dtype)
            slope = p * (self.to_student - (self.own_gap + mean))
            classes = torch.arange(p.shape[1], device=p.device) + call.shard.first
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
    others, own, own_x = sums[:, HARD].unbind(1)
    behind = torch.where(own == 1, 0, sums[:, MAX] - own_x)
    return steps.log_sum_of(others, own) + behind


def _hard_slope(
    call: DistillCall, x: Tensor, target: Tensor, sums: Tensor, scale: Tensor
) -> Tensor:
    others, own, _ = sums[:, HARD].unbind(1)
    scale = scale / (others + own)
    p = (x - _origin(sums[:, STUDENT], x)).exp() * scale.unsqueeze(1).to(x.dtype)
    at, here = (each.unsqueeze(1) for each in steps.own_class(call, target, x))
    # p - 1 as minus the others' share: exact where p is near 1.
    certainly = (-scale * others).unsqueeze(1).to(x.dtype)
    return p.scatter(1, at, torch.where(here, certainly, p.gather(1, at)))
