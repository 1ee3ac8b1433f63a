"""Labels of -1 and 1: soft and hard margins of scores, of distances and of pairs that are ranked."""

from __future__ import annotations

import torch

from ..core import errors
from ..front.definition import elements, normal, options, row
from ..front.loss import loss
from ..front.operands import (
    Types,
    broadcast,
    broadcast_of_one_rank,
    broadcast_to_input,
    of_input,
    promote_to_float,
)
from ..front.pointwise import Elements
from ..front.settings import number
from ..front.strict import target_is_number, target_is_sign
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise


def _labels(shape, dtype, generator):
    return (2 * torch.randint(2, shape, generator=generator) - 1).to(dtype)


def _scores(shape, dtype, generator):
    return 3 * normal(shape, dtype, generator), _labels(shape, dtype, generator)


def _pairs(shape, dtype, generator):
    first, second = normal(shape, dtype, generator), normal(shape, dtype, generator)
    return first, second, _labels(shape, dtype, generator)


def soft_margin(x, t):
    return -m.log_sigmoid(t * x)


def soft_margin_grad(x, t):
    e = m.exp(-m.abs(t * x))
    slope = m.where(t * x > 0.0, e, 1.0) / (1.0 + e)
    return -t * slope, -x * slope


SOFT_MARGIN = Pointwise(soft_margin, soft_margin_grad)


@loss(
    "SoftMarginLoss",
    Elements(
        of_input("soft_margin_cpu", mixed=True), shapes=broadcast_to_input, no_tensor=TypeError
    ),
    row(
        _scores,
        # PyTorch has no gradient by the target.
        differentiable=(0,),
        bench=elements("Soft margin", near=1.7, beyond=0.8),
    ),
    rules=(target_is_number, target_is_sign),
)
def soft_margin_loss():
    r"""Logistic loss of labels -1 and 1: :math:`\ell = \log(1 + e^{-t x})`, finite for any finite score.

    Args:
        input: scores, of any shape.
        target: labels; broadcasts to the input's shape. Others than -1 and 1 scale the score.
    """
    return SOFT_MARGIN


def hinge_embedding(x, t, *, margin):
    # max(0, margin - x) + x is the larger of both, of which nothing cancels.
    apart = m.where(t == -1.0, m.maximum(margin - x, 0.0), m.maximum(x, margin))
    return m.where(t == 1.0, x, apart)


def hinge_embedding_grad(x, t, *, margin):
    inside = m.where(margin - x >= 0.0, -1.0, 0.0)
    slope = m.where(t != 1.0, inside, 0.0) + m.where(t != -1.0, 1.0, 0.0)
    return (slope,)


HINGE_EMBEDDING = Pointwise(hinge_embedding, hinge_embedding_grad)


def _of_input_or_integers(name, operands, _weight, _shapes):
    input, target = operands.values()
    errors.not_narrow(name, "add_stub", NotImplementedError, input=input)
    if input.is_complex():
        errors.not_floating(name, NotImplementedError, "clamp", input=input)
    if target.requires_grad:
        target = target.detach()  # it chooses, and has no derivative
    if target.is_complex():
        target = torch.where(target.imag == 0, target.real, 0)
    operands["target"] = target
    return input.dtype


@loss(
    "HingeEmbeddingLoss",
    Elements(
        Types(
            _of_input_or_integers,
            "in the input's type",
            ("NotImplementedError: a complex tensor",),
            integers=True,
            anything=True,
            keeps=True,
        ),
        shapes=broadcast,
        no_tensor=TypeError,
    ),
    row(
        _scores,
        options(margin=0.3),
        differentiable=(0,),
        bench=elements("Hinge", near=1.15, beyond=0.6),
    ),
    rules=(target_is_number, target_is_sign),
)
def hinge_embedding_loss(margin):
    r"""Distances of pairs that are alike (1) or not (-1).

    .. math::
        \ell = \begin{cases} x & \text{if } t = 1 \\ \max(0, \Delta - x) & \text{if } t = -1 \end{cases}

    With any other target it is the sum of both. At the margin the slope is that inside, as PyTorch's.

    Args:
        input: distances, of any shape.
        target: labels of any type; broadcasts with `input`.
        margin: :math:`\Delta`, in units of the input.
    """
    return HINGE_EMBEDDING, (margin,)


def margin_ranking(input1, input2, target, *, margin):
    return m.maximum(margin - target * (input1 - input2), 0.0)


def margin_ranking_grad(input1, input2, target, *, margin):
    d = input1 - input2
    inside = m.where(margin - target * d >= 0.0, 1.0, 0.0)
    return -inside * target, inside * target, -inside * d


MARGIN_RANKING = Pointwise(margin_ranking, margin_ranking_grad)


@loss(
    "MarginRankingLoss",
    Elements(promote_to_float("clamp"), shapes=broadcast_of_one_rank),
    row(
        _pairs,
        options(margin=0.3),
        differentiable=(0, 1, 2),
        bench=elements("Margin ranking", near=1.15, beyond=0.6, yardstick="x - y, z.clone()"),
    ),
    margin=number,
)
def margin_ranking_loss(margin):
    r"""Which of two is to be ranked higher, the first (1) or the second (-1):
    :math:`\ell = \max(0, \Delta - t\,(x_1 - x_2))`.

    At the margin the slope is that inside, as PyTorch's.

    Args:
        input1: scores of the first ones.
        input2: of the second ones; broadcasts, and so does `target`. All have as many dimensions.
        target: labels.
        margin: :math:`\Delta`, in units of the inputs.
    """
    return MARGIN_RANKING, (margin,)
