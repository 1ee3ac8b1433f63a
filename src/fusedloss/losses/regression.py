"""Regression: squared and absolute errors, and what lies between."""

from __future__ import annotations

from ..front.definition import elements, normals, options, row, weights
from ..front.loss import loss
from ..front.operands import of_input, promote, warn
from ..front.pointwise import Elements, like_input
from ..front.settings import above, within
from ..front.strict import same_shape, target_is_number
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise

INF = float("inf")


def mse(x, t):
    return (x - t) * (x - t)


def mse_grad(x, t):
    slope = 2.0 * (x - t)
    return slope, -slope


MSE = Pointwise(mse, mse_grad)


@loss(
    "MSELoss",
    Elements(promote("mse_cpu"), shapes=warn, weight=like_input(mean_by="sum")),
    row(
        normals,
        options(weight=weights),
        bench=elements("MSE", near=1.15, beyond=0.45, compiled=True),
    ),
    rules=(same_shape, target_is_number),
)
def mse_loss():
    r"""Mean squared error: :math:`\ell = w\,(x - t)^2`, reduced.

    Args:
        input: predictions, of any shape; floating point, unless `target` or `weight` is.
        target: of the same shape. Other shapes broadcast, with a warning.
        reduction: 'none', 'mean' or 'sum'. With a weight, 'mean' divides by the weights' sum.
        weight: of the input's shape.
    """
    return MSE


def l1(x, t):
    return m.abs(x - t)


def l1_grad(x, t):
    sign = m.where(x > t, 1.0, m.where(x < t, -1.0, 0.0))
    slope = m.where(
        (x > t) & (x < t), x - t, sign
    )  # the sign, whose own derivative is 0 and not absent
    return slope, -slope


L1 = Pointwise(l1, l1_grad)


ABSOLUTE = Elements(
    promote("abs_cpu", anything=True), shapes=warn, weight=like_input(mean_by="sum")
)


@loss(
    "L1Loss",
    ABSOLUTE,
    row(normals, options(weight=weights), bench=elements("L1", near=1.15, beyond=0.6)),
    rules=(same_shape, target_is_number),
)
def l1_loss():
    r"""Mean absolute error: :math:`\ell = w\,|x - t|`, reduced; its gradient is 0 where x is t.

    Args:
        input: predictions, of any shape and type.
        target: of the same shape. Other shapes broadcast, with a warning.
        reduction: 'none', 'mean' or 'sum'. With a weight, 'mean' divides by the weights' sum.
        weight: of the input's shape.
    """
    return L1


def huber(x, t, *, delta):
    d = m.abs(x - t)
    return m.where(d < delta, 0.5 * d * d, delta * (d - 0.5 * delta))


def huber_grad(x, t, *, delta):
    slope = -m.maximum(-m.maximum(x - t, -delta), -delta)  # x - t, clamped to [-delta, delta]
    return slope, -slope


HUBER = Pointwise(huber, huber_grad)


@loss(
    "HuberLoss",
    Elements(of_input("huber_cpu"), shapes=warn, weight=like_input(mean_by="count")),
    row(
        normals, options(weight=weights, delta=0.3), bench=elements("Huber", near=1.15, beyond=0.6)
    ),
    rules=(same_shape, target_is_number),
    delta=above(0, RuntimeError, "huber_loss does not support non-positive values for delta."),
)
def huber_loss(delta):
    r"""Squared up to `delta`, then linear.

    .. math::
        \ell = w \begin{cases} \frac{1}{2} (x - t)^2 & \text{if } |x - t| < \delta \\
        \delta\,(|x - t| - \frac{\delta}{2}) & \text{otherwise} \end{cases}

    Args:
        input: predictions, of any shape.
        target: of the same shape. Other shapes broadcast, with a warning.
        delta: above 0, in units of the input.
        weight: of the input's shape; 'mean' divides by the number of elements all the same.
    """
    return HUBER, (delta,)


def smooth_l1(x, t, *, beta):
    d = m.abs(x - t)
    return m.where(d < beta, 0.5 * d * (d / beta), d - 0.5 * beta)


def smooth_l1_grad(x, t, *, beta):
    d = x - t
    slope = m.where(d >= beta, 1.0, m.where(-d >= beta, -1.0, d / beta))
    return slope, -slope


SMOOTH_L1 = Pointwise(smooth_l1, smooth_l1_grad)


@loss(
    "SmoothL1Loss",
    Elements(
        promote("smooth_l1_cpu"),
        shapes=warn,
        instead=lambda beta: None if beta else ABSOLUTE,
    ),
    row(normals, options(beta=0.3), bench=elements("Smooth L1", near=1.15, beyond=0.6)),
    rules=(same_shape, target_is_number),
    beta=within(0, INF, RuntimeError, "smooth_l1_loss does not support negative values for beta."),
)
def smooth_l1_loss(beta):
    r"""Squared up to `beta`, then linear with the slope 1.

    .. math::
        \ell = \begin{cases} (x - t)^2 / (2 \beta) & \text{if } |x - t| < \beta \\
        |x - t| - \frac{\beta}{2} & \text{otherwise} \end{cases}

    Args:
        input: predictions, of any shape.
        target: of the same shape. Other shapes broadcast, with a warning.
        beta: 0 or above, in units of the input; 0 gives :func:`l1_loss`, of tensors of any type.
    """
    return (SMOOTH_L1, (beta,)) if beta else L1
