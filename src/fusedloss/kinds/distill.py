"""A divergence of a head from a teacher's with all its settings, and its formula.

After the tensors of `call.py`, whose target may be None, there travel the teacher's: input (N, E),
linear_weight (C, 1, E) and linear_bias (C, 1), or else logits (N, C). There is one head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import reduce
from .call import CLASSES, WHOLE, Axes
from .heads import LinearCall, Rows, Slot, capped
from .names import DIVERGENCE_SUMS

KINDS = ("forward", "reverse", "js")


@dataclass(slots=True, repr=False, eq=False)
class DistillCall(LinearCall):
    divergence: str
    beta: float
    temperature: float
    teacher_softcap: float  # 0: none
    soft_weight: float
    hard_weight: float

    family: ClassVar[str] = "distill"
    gradients: ClassVar[int] = 3
    logits: ClassVar[int] = 2
    sums: ClassVar[int] = DIVERGENCE_SUMS

    learned: ClassVar[tuple[str, ...]] = (*LinearCall.learned, "temperature")
    of_rows: ClassVar[tuple[int, ...]] = (0, 7, 10)
    arguments: ClassVar[tuple[str, ...]] = (
        *LinearCall.arguments,
        "teacher_input",
        "teacher_weight",
        "teacher_bias",
        "teacher_logits",
    )

    def axes(self, tensors: Sequence[Slot]) -> list[Axes]:
        of_teacher: list[Axes] = [
            (0, WHOLE),
            (CLASSES, WHOLE, WHOLE),
            (CLASSES, WHOLE),
            (0, CLASSES),
        ]
        return [*LinearCall.axes(self, tensors), *of_teacher]

    def divided(self) -> tuple[int, ...]:
        return 1, 2, 8, 9, 10

    def by_formula(self, *tensors: Slot) -> tuple[Tensor, ...]:
        input, linear_weight, linear_bias, target, *rest = self.masked(tensors)
        assert input is not None and linear_weight is not None
        x = self.logits_of(input, linear_weight, linear_bias).squeeze(2)
        teacher_input, teacher_weight, teacher_bias, teacher = rest[3:]
        if teacher is None:
            assert teacher_input is not None and teacher_weight is not None
            teacher = self.logits_of(teacher_input, teacher_weight, teacher_bias).squeeze(2)
        elif self.shard is not None:
            teacher = self.shard.whole(teacher, 1)
        losses = self.divergences(
            x.to(reduce.wide(x)), teacher, None if target is None else target[:, 0]
        )
        return self.results(Rows(losses.unsqueeze(1)), tensors)

    def divergences(self, x: Tensor, teacher: Tensor, target: Slot) -> Tensor:
        """Of each row, from the logits (N, C) of both."""
        x, t = capped(x, self.softcap), capped(teacher.to(x.dtype), self.teacher_softcap)
        counted = self.counted(target)
        if counted is not None:
            x, t = (torch.where(counted.unsqueeze(1), each, 0) for each in (x, t))
        losses = self.soft_weight * self.soft(x, t)
        if target is not None:
            index = target.to(torch.int64).clamp(0, x.shape[1] - 1).unsqueeze(1)
            own = x.log_softmax(1).gather(1, index).squeeze(1)
            losses = losses - self.hard_weight * own
        return losses if counted is None else torch.where(counted, losses, 0)

    def soft(self, x: Tensor, t: Tensor) -> Tensor:
        """The divergence of each row from the logits of both."""
        ours, theirs = _softmax(x, self.temperature), _softmax(t, self.temperature)
        s, t, d = ours.p, theirs.p, log_ratios(ours, theirs)
        if self.divergence == "forward":
            return _valued(_weighted(theirs, d), divergence(t, s, d))
        if self.divergence == "reverse":
            return _valued(_weighted(ours, -d), divergence(s, t, -d))
        share, m = 1 - self.beta, self.beta * t + (1 - self.beta) * s
        to_teacher, to_student, shifted = to_mixture(d, d.gather(1, ours.largest), self.beta)
        losses = self.beta * _weighted(theirs, to_teacher)
        losses = losses + share * _weighted(ours, to_student, shifted)
        exact = self.beta * divergence(t, m, to_teacher) + share * divergence(s, m, to_student)
        return _valued(losses, exact)


@torch.no_grad()
def divergence(p: Tensor, q: Tensor, gap: Tensor) -> Tensor:
    """The sums of p gap for q = p exp(-gap), as those of p gap + q - p, of which none is negative.

    As both p and q add up to 1 these are the same, and a tiny divergence keeps its digits.
    """
    absent, small = p == 0, gap.abs() < 1
    near, far = torch.where(small, gap, 0), torch.where(small | absent, 0, gap)
    terms = torch.where(small, p * (near + torch.expm1(-near)), p * far + (q - p))
    return torch.where(absent, q, terms).sum(1)


def _valued(losses: Tensor, exact: Tensor) -> Tensor:
    """`exact`, with the derivatives of `losses`."""
    missing = (exact - losses).detach()
    return losses + torch.where(missing.isfinite(), missing, 0)


class Softmax(NamedTuple):
    """Of rows (N, C), relative to their largest class: a common offset costs no digits."""

    gaps: Tensor  # what the others are behind it
    others: Tensor  # the sum of their exps, (N, 1)
    p: Tensor
    largest: Tensor  # the class, (N, 1)


def _softmax(x: Tensor, temperature: float) -> Softmax:
    largest = x.detach().argmax(1, keepdim=True)
    # Its own gap has no derivative: through it, digits would be lost near certainty. NaN stays.
    gaps = x - x.gather(1, largest)
    gaps = gaps.scatter(1, largest, gaps.detach().gather(1, largest)) / temperature
    e = gaps.exp()
    others = e.scatter(1, largest, 0).sum(1, keepdim=True)
    return Softmax(gaps, others, e / (1 + others), largest)


def log_ratios(s: Softmax, t: Softmax) -> Tensor:
    """log p_t - log p_s, 0 for a class that has no probability in either."""
    more = t.others >= s.others
    difference = torch.where(more, t.others - s.others, s.others - t.others)
    size = torch.log1p(difference / (1 + torch.where(more, s.others, t.others)))
    d = (t.gaps - s.gaps) - torch.where(more, size, -size)
    return d.masked_fill((s.p == 0) & (t.p == 0), 0)


def _weighted(softmax: Softmax, gaps: Tensor, shifted: Slot = None) -> Tensor:
    """The sums of p gaps; a class without probability does not count.

    Of what the gaps are beyond that of the largest class, so that no digits are lost near certainty;
    `shifted` differ from the gaps by a number for each row.
    """
    own, rest = _own(softmax, gaps), gaps if shifted is None else shifted
    beyond = (rest - _own(softmax, rest)).masked_fill(softmax.p == 0, 0)
    return (softmax.p * beyond).sum(1) + own.squeeze(1)


def _own(softmax: Softmax, gaps: Tensor) -> Tensor:
    own = gaps.gather(1, softmax.largest)
    return torch.where(own.isfinite(), own, 0)


def to_mixture(d: Tensor, own: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p_t - log m and log p_s - log m from d = log p_t - log p_s: nothing of them underflows.

    `own` is that of the student's largest class.
    Where p_s is far above p_t, the second is near -log(1 - beta) for all classes: the third is without
    that, then.
    """
    teachers = d >= 0
    size = torch.where(teachers, d, -d)
    of_teacher, of_student = torch.full_like(d, beta), torch.full_like(d, 1 - beta)
    large = torch.where(teachers, of_teacher, of_student)
    small = torch.where(teachers, of_student, of_teacher)
    e = (-size).exp()
    # Far off, expm1 rounds to -1 and its derivative to 0.
    close = size < 0.5
    missing = small * torch.where(close, torch.expm1(-torch.where(close, size, 0)), e - 1)
    near = missing > -0.5
    larger = -torch.where(
        near, torch.log1p(torch.where(near, missing, 0)), (large + small * e).log()
    )
    # The smaller one from beta (e^d - 1) itself, which has its digits where beta is near 0.
    excess = large * torch.expm1(torch.where(size < 60, size, 60))
    inside = excess < 1
    smaller = torch.where(inside, -torch.log1p(torch.where(inside, excess, 0)), larger - size)
    student = torch.where(teachers, smaller, larger)
    lost = -math.log1p(-beta)
    shifted = own < -0.7
    beyond = torch.where(teachers, student - lost, -torch.log1p(beta / (1 - beta) * e))
    teacher = torch.where(teachers, larger, smaller)
    return teacher, student, torch.where(shifted, beyond, student)
