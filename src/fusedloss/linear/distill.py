"""A divergence of a head from a teacher's with all its settings, and its formula.

After the tensors of `call.py`, whose target may be None, there travel the teacher's: input (N, E),
linear_weight (C, 1, E) and linear_bias (C, 1), or else logits (N, C). There is one head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .. import formula, reduce
from .call import LinearCall, Rows, Slot, capped

KINDS = ("forward", "reverse", "js")


@dataclass(slots=True)
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

    learned: ClassVar[tuple[str, ...]] = (*LinearCall.learned, "temperature")
    arguments: ClassVar[tuple[str, ...]] = (
        *LinearCall.arguments,
        "teacher_input",
        "teacher_weight",
        "teacher_bias",
        "teacher_logits",
    )

    def by_formula(self, *tensors: Slot) -> tuple[Tensor, ...]:
        input, linear_weight, linear_bias, target = tensors[:4]
        assert input is not None and linear_weight is not None
        x = _linear(input, linear_weight, linear_bias)
        teacher_input, teacher_weight, teacher_bias, teacher = tensors[7:]
        if teacher is None:
            assert teacher_input is not None and teacher_weight is not None
            teacher = _linear(teacher_input, teacher_weight, teacher_bias)
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
        s = formula.log_probabilities(x / self.temperature, 1)
        t = formula.log_probabilities(t / self.temperature, 1)
        match self.divergence:
            case "forward":
                losses = _relative_entropy(t, s)
            case "reverse":
                losses = _relative_entropy(s, t)
            case _:
                m = torch.logaddexp(t + math.log(self.beta), s + math.log(1 - self.beta))
                losses = self.beta * _relative_entropy(t, m)
                losses = losses + (1 - self.beta) * _relative_entropy(s, m)
        losses = self.soft_weight * losses
        if target is not None:
            index = target.to(torch.int64).clamp(0, x.shape[1] - 1).unsqueeze(1)
            own = formula.gather(formula.log_probabilities(x, 1), index).squeeze(1)
            losses = losses - self.hard_weight * own
        return losses if counted is None else torch.where(counted, losses, 0)


def _linear(input: Tensor, weight: Tensor, bias: Slot) -> Tensor:
    return F.linear(input, weight[:, 0], None if bias is None else bias[:, 0])


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """Of rows of log-probabilities; a class without probability in p does not count."""
    absent = p == -math.inf
    gap = p.masked_fill(absent, 0) - q.masked_fill(absent, 0)
    return (p.exp() * gap).sum(1)
