"""Binary classification: cross entropy of probabilities and of logits."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from ..core import advice, errors
from ..front.definition import BenchCase, elements, normal, plain, row, uniform
from ..front.loss import loss
from ..front.operands import Shapes, Types, refuse, same
from ..front.pointwise import Elements, broadcasting
from ..front.settings import integer_or_none, within
from ..front.strict import input_is_no_sigmoid, target_is_number, target_is_probability
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise
from . import composed


def bce(x, t):
    # Each log is at least -100, so that the loss is finite where x is 0 or 1.
    return -(t * m.maximum(m.log(x), -100.0) + (1.0 - t) * m.maximum(m.log1p(-x), -100.0))


def bce_grad(x, t):
    slope = (x - t) / m.maximum((1.0 - x) * x, 1e-12)
    return slope, m.maximum(m.log1p(-x), -100.0) - m.maximum(m.log(x), -100.0)


def bce_domain(x, t):
    """binary_cross_entropy: all elements of input and target should be between 0 and 1"""
    return (x >= 0.0) & (x <= 1.0) & (t >= 0.0) & (t <= 1.0)


def outside(at: str, x: float, t: float) -> NoReturn:
    argument, value = ("target", t) if 0 <= x <= 1 else ("input", x)
    if value != value:
        hint = ": what was computed before has no value there"
    else:
        hint = " (for logits: binary_cross_entropy_with_logits)" if argument == "input" else ""
    shown = f"{value:g}"
    if 0 <= float(shown) <= 1:  # rounded into the range
        shown = repr(value)
    errors.fail(
        RuntimeError,
        "binary_cross_entropy",
        f"all elements of {argument} should be between 0 and 1, but {argument}{at} = {shown}{hint}",
    )


BCE = Pointwise(bce, bce_grad, domain=bce_domain, refuse=outside)


def bce_exact(x, t):
    return -(t * m.maximum(m.log(x), -100.0) + (1.0 - t) * m.maximum(m.log1p(-x), -100.0))


def bce_exact_grad(x, t):
    # (x - t) / (x (1 - x)) with its limits -1 and 1 at x = t = 1 and 0. At 1 over the clamp, 1.5 * 2^-128,
    # the slope is still finite in float32: times the 0 of a saturated sigmoid it gives 0, not NaN.
    above = m.where(t == 1.0, -1.0, m.where(t == 0.0, 1.0, x - t))
    below = m.where(t == 1.0, x, m.where(t == 0.0, 1.0 - x, x * (1.0 - x)))
    slope = above / m.maximum(below, 4.408103815583578e-39)
    return slope, m.maximum(m.log1p(-x), -100.0) - m.maximum(m.log(x), -100.0)


BCE_EXACT = Pointwise(bce_exact, bce_exact_grad, domain=bce_domain, refuse=outside)


def _weight(tensors, generator):
    """Of the last dimension's size, so that it broadcasts."""
    return uniform(tensors[0].shape[-1:], tensors[0].dtype, generator, 0.1, 3)


def of_batch(tensors, generator):
    """Of the first dimension."""
    return uniform(tensors[0].shape[:1], tensors[0].dtype, generator, 0.1, 3)


def labels(shape, dtype, generator):
    """Logits, and targets of which a third is -1, but not the first."""
    x, targets = logits(shape, dtype, generator)
    some = torch.rand(shape, generator=generator) < 0.3
    some.view(-1)[:1] = False
    return x, torch.where(some, -1, targets)


def _probabilities(shape, dtype, generator):
    return uniform(shape, dtype, generator, 0.01, 0.99), uniform(shape, dtype, generator, 0, 1)


def logits(shape, dtype, generator):
    return 3 * normal(shape, dtype, generator), uniform(shape, dtype, generator, 0, 1)


@loss(
    "BCELoss",
    Elements(
        same,
        shapes=refuse(
            "Using a target size ({target}) that is different to the input size ({input}) is "
            "deprecated. Please ensure they have the same size."
        ),
        weight=broadcasting(AttributeError),
    ),
    row(
        _probabilities,
        {"plain": plain, "weight": lambda t, g: {"weight": _weight(t, g)}},
        extensions={"exact_grad": lambda t, g: {"exact_grad": True}},
        bench=elements("BCE", near=1.7, beyond=0.6),
    ),
)
def binary_cross_entropy(exact_grad: bool = False):
    r"""Binary cross entropy of probabilities: :math:`\ell = -w\,(t \log x + (1 - t) \log(1 - x))`.

    Each log is clamped to at least -100 and the slope's denominator :math:`x (1 - x)` to at least
    1e-12, as :func:`torch.nn.functional.binary_cross_entropy` documents and does
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.BCELoss.html).

    The second clamp loses the gradient of small probabilities: for a target of 1 it is -1e12 at
    x = 1e-20, where -1e20 is right. `exact_grad` leaves it out.

    Under autocast this loss is safe: its logs are taken in float32.

    Args:
        input: probabilities in [0, 1], of any shape.
        target: in [0, 1], of the input's shape and type.
        weight: broadcasts to the target's shape.
        reduction: 'none', 'mean' (over the number of elements, whatever the weight) or 'sum'.
        exact_grad: the slope :math:`(x - t) / (x (1 - x))` itself, with its limits -1 and 1 at x = t = 1 and
            x = t = 0; kept within ±2.27e38, so that it is finite in float32 where x is 0 or 1. Not PyTorch's.

    Raises:
        RuntimeError: an element outside [0, 1] (its position is named), NaN included.
    """
    return BCE_EXACT if exact_grad else BCE


def bce_with_logits(x, t):
    # Both terms are positive for a target in [0, 1]; the first is 0, not NaN, where x is inf and right.
    slope = m.where(x > 0.0, 1.0 - t, -t)
    return m.where(slope == 0.0, 0.0, slope * x) - m.log_sigmoid(m.abs(x))


def bce_with_logits_grad(x, t):
    # sigmoid(x) - t, without the digits that it loses where it is small.
    e = m.exp(-m.abs(x))
    tail = e / (1.0 + e)
    return m.where(x > 0.0, (1.0 - t) - tail, tail - t), -x


BCE_WITH_LOGITS = Pointwise(bce_with_logits, bce_with_logits_grad)


def bce_with_logits_pos(x, t, w):
    slope = m.where(x > 0.0, 1.0 - t, -w * t)
    rest = (1.0 - t + w * t) * m.log_sigmoid(m.abs(x))
    return m.where(slope == 0.0, 0.0, slope * x) - rest


def bce_with_logits_pos_grad(x, t, w):
    e = m.exp(-m.abs(x))
    head = 1.0 / (1.0 + e)
    tail = e / (1.0 + e)
    slope = (1.0 - t) * m.where(x > 0.0, head, tail) - w * t * m.where(x > 0.0, tail, head)
    return slope, m.log_sigmoid(-x) - w * m.log_sigmoid(x), -t * m.log_sigmoid(x)


BCE_WITH_LOGITS_POS = Pointwise(bce_with_logits_pos, bce_with_logits_pos_grad)


def bce_with_logits_marked(x, t, *, smoothing, ignored):
    z = m.where(t == ignored, 0.0, x)
    one = (1.0 - smoothing) * t + 0.5 * smoothing
    other = (1.0 - smoothing) * (1.0 - t) + 0.5 * smoothing
    slope = m.where(z > 0.0, other, -one)
    value = m.where(slope == 0.0, 0.0, slope * z) - m.log_sigmoid(m.abs(z))
    return m.where(t == ignored, 0.0, value)


def bce_with_logits_marked_grad(x, t, *, smoothing, ignored):
    z = m.where(t == ignored, 0.0, x)
    one = (1.0 - smoothing) * t + 0.5 * smoothing
    other = (1.0 - smoothing) * (1.0 - t) + 0.5 * smoothing
    e = m.exp(-m.abs(z))
    tail = e / (1.0 + e)
    slope = m.where(z > 0.0, other - tail, tail - one)
    return m.where(t == ignored, 0.0, slope), (smoothing - 1.0) * z


BCE_WITH_LOGITS_MARKED = Pointwise(bce_with_logits_marked, bce_with_logits_marked_grad)


def bce_with_logits_marked_pos(x, t, w, *, smoothing, ignored):
    z = m.where(t == ignored, 0.0, x)
    one = (1.0 - smoothing) * t + 0.5 * smoothing
    other = (1.0 - smoothing) * (1.0 - t) + 0.5 * smoothing
    slope = m.where(z > 0.0, other, -w * one)
    rest = (other + w * one) * m.log_sigmoid(m.abs(z))
    value = m.where(slope == 0.0, 0.0, slope * z) - rest
    return m.where(t == ignored, 0.0, value)


def bce_with_logits_marked_pos_grad(x, t, w, *, smoothing, ignored):
    z = m.where(t == ignored, 0.0, x)
    one = (1.0 - smoothing) * t + 0.5 * smoothing
    other = (1.0 - smoothing) * (1.0 - t) + 0.5 * smoothing
    e = m.exp(-m.abs(z))
    head = 1.0 / (1.0 + e)
    tail = e / (1.0 + e)
    slope = other * m.where(z > 0.0, head, tail) - w * one * m.where(z > 0.0, tail, head)
    by_target = (1.0 - smoothing) * (m.log_sigmoid(-z) - w * m.log_sigmoid(z))
    return (
        m.where(t == ignored, 0.0, slope),
        m.where(t == ignored, 0.0, by_target),
        m.where(t == ignored, 0.0, -one * m.log_sigmoid(z)),
    )


BCE_WITH_LOGITS_MARKED_POS = Pointwise(bce_with_logits_marked_pos, bce_with_logits_marked_pos_grad)


def _types(
    name: str, operands: dict[str, Tensor], _weight: Tensor | None, _shapes: Shapes
) -> torch.dtype:
    input, target = operands.values()
    if not input.is_floating_point():
        hint = advice.swapped(input, target)
        errors.not_floating(name, NotImplementedError, "log_sigmoid_cpu", hint, input=input)
    errors.not_narrow(name, "log_sigmoid_cpu", NotImplementedError, input=input, target=target)
    if not target.is_floating_point():
        errors.not_floating(name, RuntimeError, name, target=target)
    return target.dtype


LOGITS = Types(
    _types,
    "in the target's type",
    ("RuntimeError: an integer target", "NotImplementedError: integer or complex input"),
)


@loss(
    "BCEWithLogitsLoss",
    Elements(
        LOGITS,
        shapes=refuse("Target size ({target}) must be the same as input size ({input})"),
        weight=broadcasting(TypeError),
    ),
    row(
        logits,
        {
            "plain": plain,
            "weight": lambda t, g: {"weight": _weight(t, g)},
            "pos_weight": lambda t, g: {"pos_weight": _weight(t, g)},
            "both": lambda t, g: {"weight": _weight(t, g), "pos_weight": _weight(t, g)},
        },
        bench=elements("BCE with logits", near=1.7, beyond=0.6, compiled=True),
    ),
    row(
        labels,
        {
            "ignored": lambda t, g: {"ignore_index": -1},
            "all": lambda t, g: {
                "ignore_index": -1,
                "label_smoothing": 0.3,
                "sample_weight": of_batch(t, g),
                "weight": _weight(t, g),
                "pos_weight": _weight(t, g),
            },
        },
        variant="marked",
        differentiable=(0,),
        bench=(
            BenchCase(
                *("BCE with logits, ignore_index 4M", (4096, 1024)),
                group="options",
                beside="binary_cross_entropy_with_logits",
            ),
        ),
        composed=composed.binary_cross_entropy_with_logits,
    ),
    rules=(target_is_number, target_is_probability, input_is_no_sigmoid),
    ignore_index=integer_or_none,
    label_smoothing=within(0.0, 1.0),
)
def binary_cross_entropy_with_logits(
    pos_weight,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
):
    r"""Binary cross entropy of logits, finite for any finite logit.

    .. math::
        \ell = -w\,(p\,t \log\sigma(x) + (1 - t) \log(1 - \sigma(x)))

    Args:
        input: logits x, of any shape.
        target: t, of the input's shape; in [0, 1], which is not checked.
        weight: w, broadcasts to the input's shape.
        reduction: 'none', 'mean' (over the number of elements, whatever the weight) or 'sum'.
        pos_weight: p, the weight of positive examples; broadcasts to the input's shape.
        ignore_index: elements whose target equals it count for nothing, whatever their input holds: neither in
            the loss, nor in its gradients, nor in what 'mean' divides by. This and the next are not PyTorch's.
        label_smoothing: h in [0, 1], by which a target t becomes :math:`(1 - h)\,t + h / 2`.
        sample_weight: of the first dimensions of the input, such as the batch's; multiplies the losses. 'mean'
            divides by the number of elements all the same. The module takes it in forward.
    """
    if ignore_index is None and not label_smoothing:
        return BCE_WITH_LOGITS if pos_weight is None else BCE_WITH_LOGITS_POS
    numbers = label_smoothing, math.nan if ignore_index is None else float(ignore_index)
    formula = BCE_WITH_LOGITS_MARKED if pos_weight is None else BCE_WITH_LOGITS_MARKED_POS
    return formula, numbers
