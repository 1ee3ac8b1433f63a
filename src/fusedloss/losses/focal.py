"""The focal loss of labels that are independent of each other, by their logits."""

from __future__ import annotations

import math

from torch import Tensor

from ..core.reduce import promoted
from ..front.definition import BenchCase, Bounds, elements, plain, row
from ..front.loss import loss
from ..front.operands import Types, refuse
from ..front.pointwise import Elements
from ..front.settings import at_least, integer_or_none, number, within
from ..front.strict import input_is_no_sigmoid, target_is_number, target_is_probability
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise
from . import composed
from .binary import LOGITS, labels, logits, of_batch


def sigmoid_focal(x, t, *, gamma, alpha, smoothing, ignored):
    z = m.where(t == ignored, 0.0, x)
    y = m.where(t == ignored, 0.0, t)
    one = (1.0 - smoothing) * y + 0.5 * smoothing
    other = (1.0 - smoothing) * (1.0 - y) + 0.5 * smoothing
    e = m.exp(-m.abs(z))
    head = 1.0 / (1.0 + e)
    tail = e / (1.0 + e)
    # The probability that the label does not have: of a label that is certain, of all its digits.
    missed = m.where(z > 0.0, tail, head) * one + m.where(z > 0.0, head, tail) * other
    slope = m.where(z > 0.0, other, -one)
    entropy = m.where(slope == 0.0, 0.0, slope * z) - m.log_sigmoid(m.abs(z))
    weight = m.where(alpha < 0.0, 1.0, alpha * one + (1.0 - alpha) * other)
    return m.where(t == ignored, 0.0, weight * (entropy * m.pow(missed, gamma)))


def sigmoid_focal_grad(x, t, *, gamma, alpha, smoothing, ignored):
    z = m.where(t == ignored, 0.0, x)
    y = m.where(t == ignored, 0.0, t)
    one = (1.0 - smoothing) * y + 0.5 * smoothing
    other = (1.0 - smoothing) * (1.0 - y) + 0.5 * smoothing
    e = m.exp(-m.abs(z))
    head = 1.0 / (1.0 + e)
    tail = e / (1.0 + e)
    p = m.where(z > 0.0, head, tail)
    q = m.where(z > 0.0, tail, head)
    missed = q * one + p * other
    slope = m.where(z > 0.0, other, -one)
    entropy = m.where(slope == 0.0, 0.0, slope * z) - m.log_sigmoid(m.abs(z))
    weight = m.where(alpha < 0.0, 1.0, alpha * one + (1.0 - alpha) * other)
    some = m.where(missed == 0.0, 1.0, missed)
    # The derivative of the power's logarithm, over gamma: -p or q where the label is certain.
    ratio = p * q * (other - one) / some
    focus = m.where(ratio == 0.0, 0.0, gamma * (entropy * ratio))
    power = m.pow(missed, gamma)
    by_input = weight * (power * (focus + (other * p - one * q)))
    by_label = weight * (gamma * (entropy / some * (q - p)) - z)
    by_weight = m.where(alpha < 0.0, 0.0, 2.0 * alpha - 1.0) * entropy
    by_target = (1.0 - smoothing) * (power * (by_label + by_weight))
    return m.where(t == ignored, 0.0, by_input), m.where(t == ignored, 0.0, by_target)


SIGMOID_FOCAL = Pointwise(sigmoid_focal, sigmoid_focal_grad)


def _types(name, operands, weight, shapes):
    LOGITS.check(name, operands, weight, shapes)
    return promoted(*operands.values())


ROUNDED = Bounds((6, 8), (6, 8), (8, 8))  # a power and five products follow each other
TYPES = Types(_types, "in the type that both promote to", LOGITS.raises)


@loss(
    "SigmoidFocalLoss",
    Elements(
        TYPES,
        shapes=refuse("Target size ({target}) must be the same as input size ({input})"),
        no_tensor=TypeError,
    ),
    row(
        logits,
        {
            "plain": plain,
            "gamma": lambda t, g: {"gamma": 1.5, "alpha": -1.0},
            "gamma 0": lambda t, g: {"gamma": 0.0},
        },
        composed=composed.sigmoid_focal_loss,
        differentiable=(0,),
        bounds=ROUNDED,
        bench=elements("Sigmoid focal", near=1.7, beyond=0.8),
    ),
    row(
        labels,
        {
            "ignored": lambda t, g: {"ignore_index": -1},
            "all": lambda t, g: {
                "ignore_index": -1,
                "label_smoothing": 0.3,
                "sample_weight": of_batch(t, g),
                "gamma": 0.5,
            },
        },
        variant="marked",
        differentiable=(0,),
        bench=(
            BenchCase(
                *("Sigmoid focal, ignore_index 4M", (4096, 1024)),
                group="options",
                beside="sigmoid_focal_loss",
            ),
        ),
        bounds=ROUNDED,
        composed=composed.sigmoid_focal_loss,
    ),
    rules=(target_is_number, target_is_probability, input_is_no_sigmoid),
    alpha=number,
    gamma=at_least(0),
    ignore_index=integer_or_none,
    label_smoothing=within(0.0, 1.0),
)
def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy of logits, of which examples that are right and sure count for little.

    With :math:`p = \sigma(x)`, a target t of 0 or 1, and :math:`p_t = p\,t + (1 - p)(1 - t)`

    .. math::
        \ell = (\alpha\,t + (1 - \alpha)(1 - t))\,(1 - p_t)^\gamma\,\mathrm{BCE}(x, t)

    of Lin et al., "Focal Loss for Dense Object Detection" (https://arxiv.org/abs/1708.02002), which for targets
    between 0 and 1 is taken as it stands. The arguments are those of torchvision's and fvcore's functions of
    that name, in their order, but for two defaults: `reduction` is 'none' in both of theirs, `alpha` -1 in
    fvcore. The power keeps all digits where p is near 0 or 1, and so does its gradient.

    Args:
        input: logits x, of any shape.
        target: t, of the input's shape; in [0, 1], which is not checked.
        alpha: the weight of positive examples, beside 1 - alpha of negative ones; below 0 both weigh 1.
        gamma: 0 or above; 0 gives cross entropy, weighed. In float32 on a GPU it is rounded to that.
        reduction: 'none', 'mean' (over the elements that count, whatever they weigh) or 'sum'.
        ignore_index: elements whose target equals it count for nothing, whatever their input holds: neither in
            the loss, nor in its gradients, nor in what 'mean' divides by.
        label_smoothing: h in [0, 1], by which a target t becomes :math:`(1 - h)\,t + h / 2`.
        sample_weight: of the first dimensions of the input, such as the batch's; multiplies the losses. The
            module takes it in forward.
    """
    marked = math.nan if ignore_index is None else float(ignore_index)
    return SIGMOID_FOCAL, (gamma, alpha, label_smoothing, marked)  # type: ignore[return-value]
