"""Segmentation: losses of class scores that heed rare and hard places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front.classes import Classes, Counted
from ..front.definition import BenchCase, Bounds, normal, plain, row, uniform
from ..front.loss import loss
from ..front.overlaps import Overlaps, Parts
from ..front.settings import at_least, one_of, within
from ..front.strict import input_is_no_softmax, some_row_counts
from ..kinds.dice import ACTIVATIONS, WEIGHTINGS
from . import composed
from .classification import an_ignored, class_weight, index_example

IMAGES = (8, 21, 256, 256)
# The formula has no digits of p (v - S) where a class is certain and wrong and another one's slope v is the
# same, as those of equal sizes are in a generalised overlap.
DIFFERENCES = Bounds(float32=(2, 8), float64=(3, 8), formula=(4, 1e12), triton=(4, 16))
MASKED = Bounds(float32=(2, 2), float64=(3, 8), formula=(4, 16), triton=(4, 16))
OVERLAP: dict[str, Any] = {
    "overlap": one_of("dice", "jaccard", "tversky"),
    "generalized": one_of(*WEIGHTINGS),
    **dict.fromkeys(("alpha", "beta", "smooth_nr", "smooth_dr"), at_least(0)),
}


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
        # With smoothing, sums over classes of float64 are in no wider type.
        bounds=Bounds(float32=(2, 3), float64=(32, 256), formula=(4, 64), triton=(4, 16)),
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


def _mask_example(shape, dtype, generator):
    x, mask = normal(shape, dtype, generator), uniform(shape, torch.float64, generator, 0, 1)
    return 3 * x, (mask > 0.5).to(dtype)


@loss(
    "DiceLoss",
    Overlaps(),
    row(
        index_example,
        {
            "plain": plain,
            "jaccard": lambda t, g: {"overlap": "jaccard", "batch": True, "smooth_nr": 0.0},
            "tversky": lambda t, g: {
                "overlap": "tversky",
                "alpha": 0.3,
                "beta": 0.8,
                "weight": class_weight(t, g),
                "include_background": False,
            },
            "generalized": lambda t, g: {"generalized": "square", "ignore_index": an_ignored(t, g)},
            "skip_absent": lambda t, g: {
                "skip_absent": True,
                "smooth_nr": 0.0,
                "smooth_dr": 0.0,
                "batch": True,
            },
        },
        differentiable=(0,),
        indices=1,
        composed=composed.dice_loss,
        bench=(
            BenchCase("Dice 8x21x256x256", IMAGES, beside="cross_entropy", at_most={"plain": 1.3}),
        ),
        bounds=DIFFERENCES,
    ),
    row(
        _mask_example,
        {
            "sigmoid": lambda t, g: {"activation": "sigmoid"},
            "softmax": lambda t, g: {"weight": class_weight(t, g), "generalized": "simple"},
        },
        differentiable=(0,),
        composed=composed.dice_loss,
        variant="masks",
        bench=(BenchCase("Dice of masks 8x4x256x256", (8, 4, 256, 256)),),
        bounds=MASKED,
    ),
    rules=(input_is_no_softmax,),
    activation=one_of(*ACTIVATIONS),
    **OVERLAP,
)
def dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str = "softmax",
    overlap: str = "dice",
    alpha: float = 0.5,
    beta: float = 0.5,
    generalized: str = "none",
    include_background: bool = True,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    skip_absent: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""One minus the overlap of each class with its mask: Dice, Jaccard (IoU) or Tversky.

    With p the probabilities and t the masks (one-hot for class indices), summed over the places of an image or,
    with `batch`, of all images, :math:`TP = \sum p\,t`, :math:`FP = \sum p\,(1 - t)` and
    :math:`FN = \sum (1 - p)\,t`, the loss of a class is

    .. math::
        \ell = 1 - \frac{2\,TP + s_n}{2\,TP + FP + FN + s_d},\quad
        1 - \frac{TP + s_n}{TP + FP + FN + s_d}\quad\text{or}\quad
        1 - \frac{TP + s_n}{TP + \alpha FP + \beta FN + s_d}

    (V-Net, https://arxiv.org/abs/1606.04797; Tversky, https://arxiv.org/abs/1706.05721.) It is computed from
    FP and FN, and keeps its digits near 0. A class that is neither in the target nor predicted, whose fraction
    is 0 / 0, has the loss 0 and no gradient: there is no NaN. docs/segmentation.md says which call is which of
    MONAI's and of segmentation-models-pytorch's.

    Args:
        input: scores, (N, C, ...).
        target: class indices, (N, ...); or masks, of the input's shape: bool, integers or numbers in [0, 1].
        weight: of each class, (C): multiplies its loss; 'mean' does not divide by it.
        activation: 'softmax' over the classes, 'sigmoid', or 'none' for an input that holds probabilities.
        overlap: 'dice', 'jaccard' or 'tversky'.
        alpha: of the Tversky index: what a false positive weighs.
        beta: of the Tversky index: what a false negative weighs.
        generalized: 'square', 'simple' or 'uniform' take one fraction of all classes, of the sums weighted by
            :math:`1 / T^2`, :math:`1 / T` or 1, with T the size of the mask (https://arxiv.org/abs/1707.03237);
            a class without a mask weighs as much as the most that another does.
        include_background: whether class 0 counts; the softmax is over all classes in any case.
        batch: sums are over all images, and not of each.
        smooth_nr: :math:`s_n`, 0 or more.
        smooth_dr: :math:`s_d`, 0 or more.
        skip_absent: a class without a mask has the loss 0. It is counted by 'mean' all the same. Nothing with
            `generalized`, whose classes have one loss.
        ignore_index: places with this class index, or elements of masks with this value, enter no sum.
        reduction: 'mean' over images and classes, 'sum', or 'none': (N, C), without N for `batch` and without C
            for `generalized`.
    """
    return Parts()  # type: ignore[return-value]


@loss(
    "DiceCrossEntropyLoss",
    Overlaps(indices=True, reductions=("mean", "sum")),
    row(
        index_example,
        {
            "plain": plain,
            "weights": lambda t, g: {
                "weight": class_weight(t, g),
                "lambda_dice": 0.7,
                "lambda_ce": 1.6,
                "ignore_index": an_ignored(t, g),
                "batch": True,
            },
        },
        reductions=("mean", "sum"),
        differentiable=(0,),
        indices=1,
        composed=composed.dice_cross_entropy,
        bench=(
            BenchCase(
                *("Dice + CE 8x21x256x256", IMAGES),
                beside="cross_entropy",
                at_most={"plain": 1.3, "eager": 0.2},
            ),
        ),
    ),
    rules=(input_is_no_softmax, some_row_counts),
    lambda_dice=at_least(0),
    lambda_ce=at_least(0),
    **OVERLAP,
)
def dice_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    overlap: str = "dice",
    alpha: float = 0.5,
    beta: float = 0.5,
    generalized: str = "none",
    include_background: bool = True,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    skip_absent: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Dice and cross entropy of one softmax: :math:`\ell = \lambda_d\,\mathrm{dice} + \lambda_c\,\mathrm{ce}`.

    As :func:`dice_loss` and :func:`cross_entropy`, in one call that reads the logits as often as one.

    Args:
        input: logits, (N, C, ...).
        target: class indices, (N, ...).
        weight: of each class, (C), in both.
        lambda_dice: 0 or more.
        lambda_ce: 0 or more.
    """
    return Parts(lambda_dice, lambda_ce)  # type: ignore[return-value]


@loss(
    "DiceFocalLoss",
    Overlaps(indices=True, reductions=("mean", "sum")),
    row(
        index_example,
        {
            "plain": plain,
            "weights": lambda t, g: {
                "weight": class_weight(t, g),
                "lambda_dice": 0.7,
                "lambda_focal": 1.6,
                "gamma": 1.5,
                "overlap": "jaccard",
            },
        },
        reductions=("mean", "sum"),
        differentiable=(0,),
        indices=1,
        composed=composed.dice_focal,
        bench=(
            BenchCase(
                *("Dice + focal 8x21x256x256", IMAGES),
                beside="cross_entropy",
                at_most={"plain": 1.3, "eager": 0.2},
            ),
        ),
    ),
    rules=(input_is_no_softmax, some_row_counts),
    gamma=at_least(0),
    lambda_dice=at_least(0),
    lambda_focal=at_least(0),
    **OVERLAP,
)
def dice_focal(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    overlap: str = "dice",
    alpha: float = 0.5,
    beta: float = 0.5,
    generalized: str = "none",
    include_background: bool = True,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    skip_absent: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Dice and focal loss of one softmax: :math:`\ell = \lambda_d\,\mathrm{dice} + \lambda_f\,\mathrm{focal}`.

    As :func:`dice_loss` and :func:`softmax_focal_loss`, in one call that reads the logits as often as one.

    Args:
        input: logits, (N, C, ...).
        target: class indices, (N, ...).
        weight: of each class, (C), in both.
        gamma: of the focal loss.
        lambda_dice: 0 or more.
        lambda_focal: 0 or more.
    """
    return Parts(lambda_dice, lambda_focal, gamma)  # type: ignore[return-value]
