"""Regression: the mean squared error."""

from __future__ import annotations

from ..front.definition import elements, normals, plain, row, weights
from ..front.loss import loss
from ..front.pointwise import Elements, of_input, promote, warn
from ..front.strict import same_shape, target_is_number
from ..kinds.formula import Pointwise


def mse(x, t):
    return (x - t) * (x - t)


def mse_grad(x, t):
    slope = 2.0 * (x - t)
    return slope, -slope


MSE = Pointwise(mse, mse_grad)


@loss(
    "MSELoss",
    Elements(promote("mse_cpu"), shapes=warn, weight=of_input(mean_by="sum")),
    row(
        normals,
        {"plain": plain, "weight": weights},
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
