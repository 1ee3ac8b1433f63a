"""Segmentation: losses of class scores that heed rare and hard places."""

from __future__ import annotations

from torch import Tensor

from ..front.classes import Classes, Counted
from ..front.definition import BenchCase, Bounds, plain, row
from ..front.loss import loss
from ..front.settings import at_least, within
from ..front.strict import input_is_no_softmax, some_row_counts
from . import composed
from .classification import an_ignored, class_weight, index_example

IMAGES = (8, 21, 256, 256)


@loss(
    "SoftmaxFocalLoss",
    Classes("log_softmax_lastdim_kernel_impl", softmax=True),
    row(
        index_example,
        {
            "plain": plain,
            "gamma": lambda t, g: {"gamma": 0.5},
            "weight": lambda t, g: {"weight": class_weight(t, g), "gamma": 1.0},
            "ignore_index": lambda t, g: {"ignore_index": an_ignored(t, g), "gamma": 3.5},
            "label_smoothing": lambda t, g: {"label_smoothing": 0.1},
            "all": lambda t, g: {
                "weight": class_weight(t, g),
                "gamma": 1.5,
                "ignore_index": an_ignored(t, g),
                "label_smoothing": 0.2,
            },
        },
        differentiable=(0,),
        indices=1,
        composed=composed.softmax_focal_loss,
        bench=(
            BenchCase(
                *("softmax focal 8x21x256x256", IMAGES),
                beside="cross_entropy",
                at_most={"plain": 1.3, "eager": 0.2},
            ),
        ),
        off_gpu=("label_smoothing", "all"),
        bounds=Bounds(float32=(2, 3), float64=(8, 8), formula=(4, 64)),
    ),
    rules=(input_is_no_softmax, some_row_counts),
    gamma=at_least(0),
    label_smoothing=within(0.0, 1.0),
)
def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Focal loss of the softmax of logits: cross entropy in which classes that are near certain weigh little.

    With q the one-hot target, h the smoothing, p the softmax of the C logits of a row,

    .. math::
        \ell = -\sum_c w_c \left((1 - h)\, q_c + \frac{h}{C}\right) (1 - p_c)^\gamma \log p_c

    (Lin et al., https://arxiv.org/abs/1708.02002.) With gamma 0 it is :func:`cross_entropy`. Value and gradient
    keep their digits where p is near 1, and 1 - p is not what rounding left of it.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...).
        target: class indices, (), (N) or (N, d1, ...).
        weight: of each class, (C): alpha of the paper.
        gamma: 0 or more: how much less what is near certain weighs.
        ignore_index: rows with this target contribute nothing.
        label_smoothing: h, in [0, 1].
        reduction: 'none', 'sum' or 'mean', which divides by the weights of the targets that are not ignored.
    """
    return Counted(ignore_index, label_smoothing, gamma)  # type: ignore[return-value]
