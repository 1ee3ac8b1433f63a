"""Distillation: the divergence of a linear head from a teacher's, the logits of neither in full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import errors
from ..front.definition import Bounds, row
from ..front.definition import plain as no_options
from ..front.head import Head, finite, reduction_of, scalar, setting
from ..front.loss import loss
from ..front.settings import boolean
from ..kinds.distill import KINDS, DistillCall
from . import composed
from .heads import CLASSES, HEADS, biased, ignored, of_rows, of_states


def _beside_a_teacher(shape, dtype, generator):
    teacher = (*shape[:-1], 5)
    return (*of_states(shape, dtype, generator), *of_states(teacher, dtype, generator))


def _hard(t, g):
    target = torch.randint(CLASSES, tuple(t[0].shape[:-1]), generator=g)
    weights = {"hard_weight": 0.4, "soft_weight": 0.7}
    return {"target": target, "ignore_index": ignored(target), **weights}


@loss(
    None,
    HEADS,
    row(
        _beside_a_teacher,
        {
            "forward": no_options,
            "reverse": lambda t, g: biased(
                t, g, divergence="reverse", softcap=3.0, temperature=2.0
            ),
            "js": lambda t, g: biased(
                *(t, g), divergence="js", beta=0.3, sample_weight=of_rows(t, g), **_hard(t, g)
            ),
        },
        kind="heads",
        whole=(1, 3),
        learned=("linear_bias",),
        composed=composed.linear_kl_div,
        # The formula's slopes of 'js' lose digits where both are certain, of different classes.
        bounds=Bounds(float32=(2, 4), float64=(2, 4), formula=(4, 1e13)),
        triton=False,
    ),
    exact_logits=boolean,
)
def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    target: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    softcap: Tensor | float | None = None,
    teacher_softcap: float | None = None,
    denominator: Tensor | float | None = None,
    memory_budget: int | None = None,
    exact_logits: bool = False,
    class_group: Any = None,
) -> Tensor:
    r"""Distillation: the divergence of a student's head from a teacher's, the logits of neither in full.

    With s and t the softmax of the student's and of the teacher's logits over the temperature, and
    :math:`m = \beta t + (1 - \beta) s`, the loss of a row is

    .. math::
        \ell = w_\text{soft}\, D(t, s) + w_\text{hard}\, \mathrm{cross\_entropy}(x, y),\qquad D = \begin{cases}
        \mathrm{KL}(t \| s) & \text{forward} \\ \mathrm{KL}(s \| t) & \text{reverse} \\
        \beta\, \mathrm{KL}(t \| m) + (1 - \beta)\, \mathrm{KL}(s \| m) & \text{js} \end{cases}

    ('js' is the generalised Jensen-Shannon divergence of https://arxiv.org/abs/2306.13649.) The hard term
    takes the logits x without the temperature. Where both terms are used, Hinton et al.
    (https://arxiv.org/abs/1503.02531) scale the soft one by the temperature's square: `soft_weight`.
    The teacher is a constant here: no gradient flows to it.

    Args:
        input: the student's, (..., D).
        linear_weight: the student's, (C, D).
        teacher_input: (..., E).
        teacher_weight: (C, E).
        linear_bias: (C).
        teacher_bias: (C).
        teacher_logits: (..., C), in place of the teacher's head.
        temperature: greater than 0. Where it is a tensor that requires a gradient, the logits exist in full.
        divergence: 'forward', 'reverse' or 'js'.
        beta: of 'js', between 0 and 1.
        target: class indices (...): of the hard term, and rows that are ignored do not count in either.
        soft_weight: of the divergence.
        hard_weight: of the cross entropy; it needs `target`.
        ignore_index: rows with this target contribute nothing.
        reduction: 'none', 'sum' or 'mean', which divides by `denominator` or by the number of rows that count.
        sample_weight: of each row, (...). It does not enter the denominator.
        softcap: of the student's logits, as in :func:`linear_cross_entropy`.
        teacher_softcap: of the teacher's.
        denominator: as in :func:`linear_cross_entropy`.
        memory_budget: as in :func:`linear_cross_entropy`.
        exact_logits: as there, of both heads, whose logits count by what the temperature makes of them.
        class_group: as there, of `teacher_weight`, `teacher_bias` and `teacher_logits`, too.

    Raises:
        ValueError: an unknown `divergence`; a `temperature` or `beta` out of range; a teacher given twice or
            not at all; `hard_weight` without `target`.
        TypeError: `beta`, `soft_weight`, `hard_weight` or `teacher_softcap` that requires a gradient.
    """
    name = "linear_kl_div"
    teacher = (teacher_input, teacher_weight, teacher_bias, teacher_logits)
    if divergence not in KINDS:
        expected = ", ".join(map(repr, KINDS))
        errors.fail(ValueError, name, f"divergence must be one of {expected}, got {divergence!r}")
    beta, hard_weight = errors.number(name, "beta", beta), finite(name, "hard_weight", hard_weight)
    ignore_index = errors.integer(name, "ignore_index", ignore_index)
    if not 0 < beta < 1:
        errors.fail(ValueError, name, f"beta must be between 0 and 1, got {beta}")
    if hard_weight and target is None:
        errors.fail(ValueError, name, f"hard_weight = {hard_weight} needs a target")
    reduction = reduction_of(name, reduction, denominator)
    given = (softcap, 1.0, memory_budget, exact_logits, class_group)
    head = Head(name, input, linear_weight, linear_bias, *given)
    if head.out:
        errors.fail(
            RuntimeError,
            name,
            f"expected linear_weight with dimensionality 2, got {list(linear_weight.shape)}",
        )
    if target is not None and head.check_target(target, None, ignore_index):
        errors.fail(
            RuntimeError, name, f"target holds probabilities of {target.dtype}, not indices"
        )
    return head.run(
        DistillCall,
        target,
        None,
        head.check_sample_weight(sample_weight),
        scalar(name, denominator, input),
        head.teacher(*teacher),
        probabilities=False,
        reduction=reduction,
        ignore_index=ignore_index,
        smoothing=0.0,
        z_loss=0.0,
        divergence=divergence,
        beta=beta,
        temperature=setting(name, "temperature", temperature, above=0.0),
        teacher_softcap=0.0
        if teacher_softcap is None
        else finite(name, "teacher_softcap", teacher_softcap, above=0.0),
        soft_weight=finite(name, "soft_weight", soft_weight),
        hard_weight=hard_weight,
    )
