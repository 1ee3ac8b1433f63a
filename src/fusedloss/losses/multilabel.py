"""Several labels a row: the logistic loss of each class, averaged over the classes."""

from __future__ import annotations

from ..front.definition import BenchCase, normal, plain, row, uniform
from ..front.loss import loss
from ..front.vectors import MeanOfClasses
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise
from ..kinds.reduction import Reduction, Sums
from .binary import BCE_WITH_LOGITS


def logistic(input, target):
    # As binary cross entropy with logits: none is negative for a target in [0, 1].
    slope = m.where(input > 0.0, 1.0 - target, -target)
    head = m.where(slope == 0.0, 0.0, slope * input)
    return head, -m.log_sigmoid(m.abs(input))


def logistic_slope(input, target, by_head, by_tail):
    e = m.exp(m.where(input > 0.0, -input, input))
    share = e / (1.0 + e)
    slope = m.where(input > 0.0, 1.0 - target, -target)
    head = m.where(by_head == 0.0, 0.0, by_head * slope)  # no 0 * inf
    by_target = m.where(by_head == 0.0, 0.0, -by_head * input)
    return head + by_tail * m.where(input > 0.0, -share, share), by_target


def weighted_logistic(input, target, weight):
    slope = m.where(input > 0.0, 1.0 - target, -target)
    head = m.where(slope == 0.0, 0.0, slope * input)
    return weight * head, -weight * m.log_sigmoid(m.abs(input))


def weighted_logistic_slope(input, target, weight, by_head, by_tail):
    slope = m.where(input > 0.0, 1.0 - target, -target)
    e = m.exp(m.where(input > 0.0, -input, input))
    share = e / (1.0 + e)
    by_slope = m.where(by_head == 0.0, 0.0, by_head * slope)  # no 0 * inf
    by_input = by_slope + by_tail * m.where(input > 0.0, -share, share)
    head = m.where(slope == 0.0, 0.0, slope * input)
    by_target = m.where(by_head == 0.0, 0.0, -by_head * input)
    by_weight = m.where(by_head == 0.0, 0.0, by_head * head) - by_tail * m.log_sigmoid(m.abs(input))
    return weight * by_input, weight * by_target, by_weight


def mean_of(head, tail, *, classes):
    return (head + tail) / classes


def mean_of_grad(head, tail, *, classes):
    return 1.0 / classes, 1.0 / classes


SOFT_MARGIN = Reduction(
    "soft_margin",
    "multilabel_soft_margin_loss",
    Sums(logistic, logistic_slope),
    Pointwise(mean_of, mean_of_grad),
)
WEIGHTED_SOFT_MARGIN = Reduction(
    "weighted_soft_margin",
    "multilabel_soft_margin_loss",
    Sums(weighted_logistic, weighted_logistic_slope),
    Pointwise(mean_of, mean_of_grad),
)


def _labels(shape, dtype, generator):
    return 2 * normal(shape, dtype, generator), uniform(shape, dtype, generator, 0, 1).round()


def _of_classes(tensors, generator):
    return uniform(tensors[0].shape[-1:], tensors[0].dtype, generator, 0.1, 2)


@loss(
    "MultiLabelSoftMarginLoss",
    MeanOfClasses(SOFT_MARGIN, WEIGHTED_SOFT_MARGIN, BCE_WITH_LOGITS),
    row(
        _labels,
        {"plain": plain, "weight": lambda t, g: {"weight": _of_classes(t, g)}},
        bench=(
            BenchCase("soft margin 4096x1024", (4096, 1024), compiled=True),
            BenchCase("soft margin 65536x1024", (65536, 1024), group="gpu"),
        ),
    ),
)
def multilabel_soft_margin_loss():
    r"""Logistic loss of each class, averaged over the C classes:

    .. math::
        \ell = -\frac{1}{C} \sum_c w_c \left(t_c \log \sigma(x_c) + (1 - t_c) \log \sigma(-x_c)\right)

    Args:
        input: logits x, (..., C).
        target: t, of the same shape: 1 for each class that is a label, 0 for others; or what lies between.
            Sizes of 1 broadcast.
        weight: of each class, (C), or of any shape that broadcasts to the input's.
        reduction: 'none', 'mean' (over the rows) or 'sum'.
    """
    return ()
