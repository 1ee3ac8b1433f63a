"""Margins between the classes that are labels of a row and those that are not."""

from __future__ import annotations

import torch

from ..front.definition import BenchCase, Bounds, normal, options, row, uniform
from ..front.loss import loss
from ..front.margins import Hinge, Margins, one_or_two
from ..front.settings import number
from . import composed


def _one_label(shape, dtype, generator):
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    return normal(shape, dtype, generator), target


def _label_sets(shape, dtype, generator):
    """Up to eight labels a row, then -1; what follows does not count."""
    target = torch.rand(shape, generator=generator).argsort(-1)
    end = torch.randint(min(shape[-1], 8) + 1, (*shape[:-1], 1), generator=generator)
    place = torch.arange(shape[-1]).expand(shape)
    return normal(shape, dtype, generator), target.masked_fill(place == end, -1)


def _of_classes(tensors, generator):
    return uniform(tensors[0].shape[-1:], tensors[0].dtype, generator, 0.1, 2)


@loss(
    "MultiMarginLoss",
    Margins("multi_margin_loss_cpu_kernel"),
    row(
        _one_label,
        options(p=2, margin=0.5, weight=_of_classes),
        differentiable=(0,),
        indices=1,
        dims=2,
        written_out=composed.multi_margin_loss,
        bounds=Bounds(formula=(4, 2)),  # it sums in the type computed in
        bench=(
            BenchCase("multi margin 4096x1024", (4096, 1024), at_most={"eager": 0.25}),
            BenchCase("multi margin 65536x1024", (65536, 1024), group="gpu"),
        ),
    ),
    p=one_or_two,
    margin=number,
)
def multi_margin_loss(p, margin):
    r"""How much the other classes come within a margin of the label y of a row of C classes:
    :math:`\ell = \frac{w_y}{C} \sum_{c \ne y} \max(0, \text{margin} - x_y + x_c)^p`.

    Args:
        input: scores x, (N, C) or (C).
        target: y, (N) or (), of any integer type.
        p: 1 or 2.
        margin: in units of the input.
        weight: of each class, (C).
        reduction: 'none', 'mean' (over the rows, whatever the weight) or 'sum'.
    """
    return Hinge(p == 2, margin)


@loss(
    "MultiLabelMarginLoss",
    Margins("multilabel_margin_loss_forward_out_frame", sets=True),
    row(
        _label_sets,
        differentiable=(0,),
        dims=2,
        written_out=composed.multilabel_margin_loss,
        bench=(
            BenchCase("multilabel margin 4096x1024", (4096, 1024), at_most={"eager": 0.25}),
            BenchCase("multilabel margin 65536x1024", (65536, 1024), group="gpu"),
        ),
    ),
)
def multilabel_margin_loss():
    r"""The same for a set Y of labels: :math:`\ell = \frac{1}{C} \sum_{y \in Y} \sum_{c \notin Y} \max(0,
    1 - x_y + x_c)`.

    Args:
        input: scores x, (N, C) or (C).
        target: of the input's shape and any integer type: the labels of each row from its start, to the end
            or to the first -1. One that stands twice counts twice.
        reduction: 'none', 'mean' (over the rows) or 'sum'.
    """
    return Hinge()
