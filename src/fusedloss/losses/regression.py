"""Regression: the mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..core import errors, levels
from ..core.plain import check as check_memory
from ..core.reduce import resolve, result_dtype, sum_of
from ..front import strict
from ..front.definition import BenchCase, Loss, normal, plain, register, uniform
from ..kinds.formula import Pointwise
from ..kinds.pointwise import PointwiseCall
from ..route.dispatch import dispatch
from ..route.memo import repeat


def mse(x, t):
    return (x - t) * (x - t)


def mse_grad(x, t):
    slope = 2.0 * (x - t)
    return slope, -slope


MSE = Pointwise(mse, mse_grad)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error: :math:`\ell = w\,(x - t)^2`, reduced.

    As :func:`torch.nn.functional.mse_loss`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.mse_loss.html).

    Args:
        input: predictions, of any shape; floating point, unless `target` or `weight` is.
        target: of the same shape. Other shapes broadcast, with a warning.
        size_average: deprecated, overrides `reduction`.
        reduce: deprecated, overrides `reduction`.
        reduction: 'none', 'mean' or 'sum'. With a weight, 'mean' divides by the weights' sum.
        weight: of the input's shape.

    Returns:
        A scalar, or the losses of all elements with 'none', in the type that `input` and `target`
        promote to (float32 under autocast).

    Raises:
        ValueError: unknown `reduction`; `weight` of another shape than `input`.
        RuntimeError: shapes that do not broadcast; tensors on different devices.
        NotImplementedError: no floating point tensor, or a complex one.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            mse_loss,
            (input, target, weight),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            weight=weight,
        )
    name = "mse_loss"
    settings = (reduction,) if weight is size_average is reduce is None else None
    if settings and (known := repeat(name, (input, target, None), settings)) is not None:
        return known
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        errors.not_tensors(name, AttributeError, input=input, target=target)
    if not (weight is None or isinstance(weight, Tensor)):
        errors.not_tensors(name, AttributeError, weight=weight)
    if levels.strict():
        strict.check(name, input, target)
    if target.shape != input.shape:
        errors.broadcast(name, input=input, target=target)
        errors.warn_broadcast(name, input, target)
        settings = None  # to warn again
    reduction = resolve(name, reduction, size_average, reduce)
    if target.device != input.device or weight is not None:
        errors.same_device(name, input=input, target=target, weight=weight)
    weights = {} if weight is None else {"weight": weight}
    errors.not_narrow(name, "mse_cpu", input=input, target=target, **weights)
    dtype = input.dtype
    if target.dtype != dtype:
        dtype = torch.promote_types(dtype, target.dtype)  # of 0-dim tensors too
    if dtype.is_complex:
        errors.not_floating(name, NotImplementedError, "mse_cpu", input=input, target=target)
    denominator = None
    if weight is not None or input.dtype != target.dtype:
        check_memory(name, input=input, target=target, weight=weight)
    if weight is not None:
        if weight.shape != input.shape:
            errors.fail(
                ValueError,
                name,
                "Weights and input must have the same size. weight has shape "
                f"{list(weight.shape)}, input {list(input.shape)}",
            )
        if weight.is_complex():
            errors.not_floating(name, NotImplementedError, "mse_cpu", weight=weight)
        # A 0-dim one yields to the losses' type, but not to that of their sum.
        if reduction == "mean" or weight.dim() or not (target.dim() and dtype.is_floating_point):
            dtype = torch.promote_types(dtype, weight.dtype)
        if weight.dtype is torch.float64:  # the kernel computes in the widest type of its operands
            input = input.double()
        if reduction == "mean":
            denominator = sum_of(weight)
    if not dtype.is_floating_point:
        errors.not_floating(name, NotImplementedError, "mse_cpu", input=input, target=target)
    floating = input.is_floating_point(), target.is_floating_point()
    if not all(floating):
        # An integer tensor beside a floating one takes its type; the difference of two is exact.
        kind = dtype if any(floating) else torch.float64
        input, target = (t if t.is_floating_point() else t.to(kind) for t in (input, target))
    call = PointwiseCall(MSE, (), reduction, denominator, result_dtype(dtype, input))
    return dispatch(name, call, (input, target, weight), settings=settings)


def _example(shape, dtype, generator):
    return normal(shape, dtype, generator), normal(shape, dtype, generator)


register(
    Loss(
        mse_loss,
        "MSELoss",
        _example,
        {
            "plain": plain,
            "weight": lambda tensors, generator: {
                "weight": uniform(tensors[0].shape, tensors[0].dtype, generator, 0.1, 2)
            },
        },
        bench=(
            BenchCase("MSE 4M", (4096, 1024), compiled=True, at_most={"x - y": 1.15}),
            BenchCase("MSE 16M", (16384, 1024), group="beyond", at_most={"x - y": 0.45}),
            BenchCase("MSE 64M", (64, 1 << 20), group="gpu", compiled=True),
            BenchCase("MSE 64M bf16", (64, 1 << 20), "bfloat16", group="gpu"),
        ),
    )
)
