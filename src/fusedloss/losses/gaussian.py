"""The likelihood of a Gaussian distribution, of which mean and variance are predicted."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core import errors
from ..core.reduce import REDUCTIONS
from ..front.definition import Bounds, elements, normal, options, row, uniform
from ..front.loss import Definition, loss
from ..front.operands import Shapes, Tensors, Types, broadcast, promote
from ..front.pointwise import Elements, Reduction
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise


def gaussian(x, t, var, *, eps, constant):
    v = m.at_least(var, eps)
    d = x - t
    return 0.5 * (m.log(v) + d * (d / v)) + constant


def gaussian_grad(x, t, var, *, eps, constant):
    v = m.at_least(var, eps)
    d = x - t
    slope = d / v
    return slope, -slope, 0.5 * (1.0 - d * slope) / v


def gaussian_domain(x, t, var, *, eps, constant):
    """gaussian_nll_loss: var has negative entry/entries"""
    return (var >= 0.0) | (var != var)


def _negative(at: str, _x: float, var: float) -> NoReturn:
    where = f" at {at}" if at else ""
    fix = "predict its log, and pass the exp of that"
    words = f"var has negative entry/entries, {var:g}{where}: a variance is 0 or above; {fix}"
    errors.fail(ValueError, "gaussian_nll_loss", words)


GAUSSIAN = Pointwise(gaussian, gaussian_grad, domain=gaussian_domain, refuse=_negative, told=(0, 2))
HALF_LOG_OF_TWO_PI = 0.9189385332046727


def _arranged(name: str, given: dict[str, Any]) -> dict[str, Any]:
    given = _with_variance(name, given)
    var, eps = given["var"], given["eps"]
    if not (isinstance(eps, Tensor) and isinstance(var, Tensor) and var.is_floating_point()):
        return given
    eps = eps.detach()  # in PyTorch no gradient passes the clamp to it
    if not eps.dim():
        return {**given, "eps": eps}
    errors.expands(name, var.shape, eps=eps)
    low = (var >= 0) & (var < eps)  # what is negative is refused
    return {
        **given,
        "var": torch.where(low, eps + (var - var.detach()), var).to(var.dtype),
        "eps": 0.0,
    }


def _with_variance(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """A number is a variance of all elements, and a shape without the last dimension one of each row."""
    input, var = given["input"], given["var"]
    if not isinstance(input, Tensor):
        return given
    if not isinstance(var, Tensor):
        var = errors.number(name, "var", var)
        if var < 0:
            _negative("", 0.0, var)
        if input.is_floating_point():
            return {**given, "var": torch.full((), var, dtype=input.dtype, device=input.device)}
        # In PyTorch the number makes floats of the input, whose type that of the result depends on.
        made = torch.full((), var, dtype=torch.get_default_dtype(), device=input.device)
        return {**given, "var": made.expand(input.shape)}
    shape, own = input.shape, var.shape
    if own == shape:
        return given
    if own == shape[:-1]:
        return {**given, "var": var.unsqueeze(-1)}
    # PyTorch's rule: one dimension of size 1, or sizes that differ and sum to 1.
    if len(own) != len(shape) or sum(b for a, b in zip(shape, own, strict=True) if a != b) != 1:
        words = (
            f"var is of incorrect size: {list(own)} for an input of {list(shape)}. It is of the input's "
            f"shape, of {list(shape[:-1])}, or has the size 1 in one dimension"
        )
        errors.fail(ValueError, name, words)
    return given


PROMOTED = promote("gaussian_nll_cpu")


def _types(name: str, operands: Tensors, weight: Tensor | None, shapes: Shapes) -> torch.dtype:
    var = operands["var"]
    if not (var.is_floating_point() or var.is_complex()):
        errors.not_floating(name, RuntimeError, "clamp", var=var)
    return PROMOTED.check(name, operands, weight, shapes)


TYPES = Types(
    _types, PROMOTED.returns, (*PROMOTED.raises, "RuntimeError: `var` of integers"), integers=True
)


def _reduction(loss: Definition, given: dict[str, Any]) -> Reduction:
    reduction = given["reduction"]
    if reduction not in REDUCTIONS:
        words = f"{reduction} is not valid as reduction; expected one of 'none', 'mean', 'sum'"
        errors.fail(ValueError, loss.name, words)
    return Reduction(reduction)


def _predictions(shape, dtype, generator):
    mean, observed = normal(shape, dtype, generator), normal(shape, dtype, generator)
    return mean, observed, uniform(shape, dtype, generator, 0.1, 3)


@loss(
    "GaussianNLLLoss",
    Elements(TYPES, shapes=broadcast, reduction=_reduction, arranged=_arranged),
    row(
        _predictions,
        options(full=True, eps=0.05),
        differentiable=(0, 1, 2),
        # The logarithm and the square cancel where the deviation is about that of the variance.
        bounds=Bounds(float32=(16, 4), float64=(16, 4), formula=(16, 4)),
        bench=elements("Gaussian", near=1.7, beyond=0.8, yardstick="x - y, z.clone()"),
    ),
)
def gaussian_nll_loss(full, eps):
    r"""Negative log likelihood of a mean and a variance:
    :math:`\ell = \tfrac12 (\log v + (x - t)^2 / v)`, with :math:`v` the variance, at least :math:`\epsilon`.

    As in PyTorch the gradient by `var` passes the clamp: below `eps` it is that at `eps`.

    Args:
        input: predicted means x, of any shape.
        target: observations t; broadcasts with `input`.
        var: variances, of the input's shape, of that without its last dimension, or with the size 1 in one
            dimension; or a number.
        full: adds :math:`\log(2 \pi) / 2`.
        eps: the least variance: a number, or a tensor that broadcasts to `var`.

    Raises:
        ValueError: a negative variance (its position is named), NaN excluded; `var` of another shape.
    """
    return GAUSSIAN, (eps, HALF_LOG_OF_TWO_PI if full else 0.0)
