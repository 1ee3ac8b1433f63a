"""docs/segmentation.md: formulas of MONAI and segmentation-models-pytorch, written out, and our calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812

from fusedloss import dice_cross_entropy, dice_focal, dice_loss, softmax_focal_loss

C = 4


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, C).movedim(-1, 1).double()


def monai(
    p: Tensor,
    t: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    doubled: bool = True,
    background: bool = True,
    batch: bool = False,
    nr: float = 1e-5,
    dr: float = 1e-5,
    w_type: str = "",
) -> Tensor:
    """monai.losses.dice: DiceLoss and its like from probabilities and masks."""
    if not background:
        p, t = p[:, 1:], t[:, 1:]
    axes = [0, 2, 3] if batch else [2, 3]
    tp = (p * t).sum(axes)
    fp, fn = p.sum(axes) - tp, t.sum(axes) - tp
    factor = 2 if doubled else 1
    above, below = factor * tp, factor * (tp + alpha * fp + beta * fn)
    if not w_type:
        return (1 - (above + nr) / (below + dr)).mean()
    w = {"square": lambda g: 1 / (g * g), "simple": lambda g: 1 / g, "uniform": torch.ones_like}[
        w_type
    ](t.sum(axes))
    infinite = w.isinf()
    w = torch.where(infinite, 0, w)
    w = w + infinite * (w.max() if batch else w.max(1, keepdim=True)[0])
    axis = 0 if batch else 1
    return (1 - ((above * w).sum(axis) + nr) / ((below * w).sum(axis) + dr)).mean()


def smp(p: Tensor, t: Tensor, kept: Tensor | float, alpha: float, beta: float, s: float) -> Tensor:
    """segmentation_models_pytorch.losses: soft_tversky_score and what its losses make of it."""
    p, t = (p * kept).flatten(2), (t * kept).flatten(2)
    ours, theirs = p.sum((0, 2)), t.sum((0, 2))
    tp = (ours + theirs - (p - t).abs().sum((0, 2))) / 2
    below = tp + alpha * (ours - tp) + beta * (theirs - tp) + s
    losses = 1 - (tp + s) / below.clamp_min(1e-7)
    return (losses * (theirs > 0)).mean()


SMP: dict[str, Any] = {"batch": True, "skip_absent": True}
Call = Callable[[Tensor, Tensor], Tensor]
CALLS: dict[str, tuple[Call, Call]] = {
    "MONAI softmax": (dice_loss, lambda x, y: monai(x.softmax(1), one_hot(y))),
    "MONAI sigmoid": (
        lambda x, y: dice_loss(x, one_hot(y), activation="sigmoid"),
        lambda x, y: monai(x.sigmoid(), one_hot(y)),
    ),
    "MONAI probabilities": (
        lambda x, y: dice_loss(x.sigmoid(), one_hot(y), activation="none", batch=True),
        lambda x, y: monai(x.sigmoid(), one_hot(y), batch=True),
    ),
    "MONAI background": (
        lambda x, y: dice_loss(x, y, include_background=False, smooth_nr=0.0, smooth_dr=0.3),
        lambda x, y: monai(x.softmax(1), one_hot(y), background=False, nr=0.0, dr=0.3),
    ),
    "MONAI Jaccard": (
        lambda x, y: dice_loss(x, y, overlap="jaccard", smooth_nr=0.1, smooth_dr=0.2),
        lambda x, y: monai(x.softmax(1), one_hot(y), alpha=1, beta=1, nr=0.2, dr=0.4),
    ),
    "MONAI Tversky": (
        lambda x, y: dice_loss(x, y, overlap="tversky", alpha=0.3, beta=0.8),
        lambda x, y: monai(x.softmax(1), one_hot(y), alpha=0.3, beta=0.8, doubled=False),
    ),
    **{
        f"MONAI {w}, batch {b}": (
            lambda x, y, w=w, b=b: dice_loss(x, y, generalized=w, batch=b),
            lambda x, y, w=w, b=b: monai(x.softmax(1), one_hot(y), w_type=w, batch=b),
        )
        for w in ("square", "simple", "uniform")
        for b in (False, True)
    },
    "smp Dice": (
        lambda x, y: dice_loss(x, y, **SMP, smooth_nr=0.4, smooth_dr=0.4),
        lambda x, y: smp(x.softmax(1), one_hot(y), 1.0, 0.5, 0.5, 0.2),
    ),
    "smp Dice, defaults": (
        lambda x, y: dice_loss(x, y, **SMP, smooth_nr=0.0, smooth_dr=0.0),
        lambda x, y: smp(x.softmax(1), one_hot(y), 1.0, 0.5, 0.5, 0.0),
    ),
    "smp Jaccard": (
        lambda x, y: dice_loss(x, y, **SMP, overlap="jaccard", smooth_nr=0.2, smooth_dr=0.2),
        lambda x, y: smp(x.softmax(1), one_hot(y), 1.0, 1.0, 1.0, 0.2),
    ),
    "smp Tversky": (
        lambda x, y: dice_loss(
            x, y, **SMP, overlap="tversky", alpha=0.3, beta=0.8, smooth_nr=0.0, smooth_dr=0.0
        ),
        lambda x, y: smp(x.softmax(1), one_hot(y), 1.0, 0.3, 0.8, 0.0),
    ),
    "smp multilabel": (
        lambda x, y: dice_loss(
            x, one_hot(y), activation="sigmoid", **SMP, smooth_nr=0.0, smooth_dr=0.0
        ),
        lambda x, y: smp(x.sigmoid(), one_hot(y), 1.0, 0.5, 0.5, 0.0),
    ),
    "smp ignored": (
        lambda x, y: dice_loss(x, y, **SMP, smooth_nr=0.0, smooth_dr=0.0, ignore_index=1),
        lambda x, y: smp(x.softmax(1), one_hot(y), (y != 1).unsqueeze(1), 0.5, 0.5, 0.0),
    ),
    "MONAI DiceCE": (
        lambda x, y: dice_cross_entropy(x, y, lambda_dice=0.6, lambda_ce=1.4),
        lambda x, y: 0.6 * monai(x.softmax(1), one_hot(y)) + 1.4 * F.cross_entropy(x, y),
    ),
    "MONAI focal": (
        lambda x, y: softmax_focal_loss(x, y, gamma=1.5) / C,
        lambda x, y: -((1 - x.softmax(1)) ** 1.5 * x.log_softmax(1) * one_hot(y)).mean(),
    ),
    "MONAI Dice and focal": (
        lambda x, y: dice_focal(x, y, lambda_focal=0.7 / C),
        lambda x, y: (
            monai(x.softmax(1), one_hot(y))
            - 0.7 * ((1 - x.softmax(1)) ** 2 * x.log_softmax(1) * one_hot(y)).mean()
        ),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_ours_is_theirs(name: str, generator: Generator) -> None:
    ours, theirs = CALLS[name]
    x = 2 * torch.randn(3, C, 5, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(C - 1, (3, 5, 6), generator=generator)  # the last class is absent
    x.requires_grad_()
    values = [f(x, y) for f in (ours, theirs)]
    grads = [torch.autograd.grad(v, x)[0] for v in values]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
