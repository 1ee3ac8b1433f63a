"""Binary classification: cross entropy of probabilities and of logits."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..core import advice, errors, levels, sharded
from ..core.plain import check as check_memory
from ..core.reduce import resolve, result_dtype
from ..front import strict
from ..front.definition import BenchCase, Loss, normal, plain, register, uniform
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise
from ..kinds.pointwise import PointwiseCall
from ..kinds.torch_m import OutsideDomain
from ..route.dispatch import dispatch
from ..route.memo import repeat


def bce(x, t):
    # Each log is at least -100, so that the loss is finite where x is 0 or 1.
    return -(t * m.maximum(m.log(x), -100.0) + (1.0 - t) * m.maximum(m.log1p(-x), -100.0))


def bce_grad(x, t):
    slope = (x - t) / m.maximum((1.0 - x) * x, 1e-12)
    return slope, m.maximum(m.log1p(-x), -100.0) - m.maximum(m.log(x), -100.0)


def bce_domain(x, t):
    """binary_cross_entropy: all elements of input and target should be between 0 and 1"""
    return (x >= 0.0) & (x <= 1.0) & (t >= 0.0) & (t <= 1.0)


def _refuse(at: str, x: float, t: float) -> NoReturn:
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


BCE = Pointwise(bce, bce_grad, domain=bce_domain, refuse=_refuse)


def bce_exact(x, t):
    return -(t * m.maximum(m.log(x), -100.0) + (1.0 - t) * m.maximum(m.log1p(-x), -100.0))


def bce_exact_grad(x, t):
    # (x - t) / (x (1 - x)) with its limits -1 and 1 at x = t = 1 and 0. At 1 over the clamp, 1.5 * 2^-128,
    # the slope is still finite in float32: times the 0 of a saturated sigmoid it gives 0, not NaN.
    above = m.where(t == 1.0, -1.0, m.where(t == 0.0, 1.0, x - t))
    below = m.where(t == 1.0, x, m.where(t == 0.0, 1.0 - x, x * (1.0 - x)))
    slope = above / m.maximum(below, 4.408103815583578e-39)
    return slope, m.maximum(m.log1p(-x), -100.0) - m.maximum(m.log(x), -100.0)


BCE_EXACT = Pointwise(bce_exact, bce_exact_grad, domain=bce_domain, refuse=_refuse)


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


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    exact_grad: bool = False,
) -> Tensor:
    r"""Binary cross entropy of probabilities: :math:`\ell = -w\,(t \log x + (1 - t) \log(1 - x))`.

    Each log is clamped to at least -100 and the slope's denominator :math:`x (1 - x)` to at least
    1e-12, as :func:`torch.nn.functional.binary_cross_entropy` documents and does
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.BCELoss.html).

    The second clamp loses the gradient of small probabilities: for a target of 1 it is -1e12 at
    x = 1e-20, where -1e20 is right. `exact_grad` leaves it out.

    Args:
        input: probabilities in [0, 1], of any shape.
        target: in [0, 1], of the input's shape and type.
        weight: broadcasts to the target's shape.
        size_average: deprecated, overrides `reduction`.
        reduce: deprecated, overrides `reduction`.
        reduction: 'none', 'mean' (over the number of elements, whatever the weight) or 'sum'.
        exact_grad: the slope :math:`(x - t) / (x (1 - x))` itself, with its limits -1 and 1 at x = t = 1 and
            x = t = 0; kept within ±2.27e38, so that it is finite in float32 where x is 0 or 1. Not PyTorch's.

    Returns:
        A scalar, or the losses of all elements with 'none', in the input's type (float32 under
        autocast, where this loss is safe: its logs are taken in float32).

    Raises:
        ValueError: unknown `reduction`; a target of another shape.
        RuntimeError: an element outside [0, 1] (its position is named), NaN included; types or
            devices that differ; a weight that does not broadcast.
        NotImplementedError: integer or complex tensors.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            binary_cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            **({"exact_grad": True} if exact_grad else {}),  # PyTorch's own has none
        )
    name = "binary_cross_entropy"
    plain = weight is size_average is reduce is None and (exact_grad is False or exact_grad is True)
    settings = (reduction, exact_grad) if plain else None
    try:
        if settings and (known := repeat(name, (input, target, None), settings)) is not None:
            return known
    except OutsideDomain:
        _refuse_first(input, target)
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        errors.not_tensors(name, AttributeError, input=input, target=target)
    if not (weight is None or isinstance(weight, Tensor)):
        errors.not_tensors(name, AttributeError, weight=weight)
    errors.boolean(name, "exact_grad", exact_grad)
    reduction = resolve(name, reduction, size_average, reduce)
    if target.shape != input.shape:
        errors.fail(
            ValueError,
            name,
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}) is deprecated. Please ensure they have the same size."
            + advice.like_input(input, target),
        )
    if target.device != input.device or weight is not None:
        errors.same_device(name, input=input, target=target, weight=weight)
    errors.not_narrow(name, name, input=input, target=target)
    dtype = result_dtype(input.dtype, input)
    if target.dtype != input.dtype and result_dtype(target.dtype, target) is not dtype:
        hint = advice.swapped(input, target) or f": pass {advice.cast('target', input.dtype)}"
        errors.fail(
            RuntimeError,
            name,
            f"Found dtype {target.dtype} but expected {input.dtype} for target{hint}",
        )
    if not (input.is_floating_point() and target.is_floating_point()):
        errors.not_floating(name, NotImplementedError, name, input=input, target=target)
    if weight is not None:
        errors.expands(name, input.shape, weight=weight)
        weight = _floating(name, input, weight=weight)
    call = PointwiseCall(BCE_EXACT if exact_grad else BCE, (), reduction, None, dtype)
    try:
        return dispatch(name, call, (input, target, weight), settings=settings)
    except OutsideDomain:
        _refuse_first(input, target)


def _refuse_first(input: Tensor, target: Tensor) -> NoReturn:
    input, target = sharded.whole(input), sharded.whole(target)
    first = int((~bce_domain(input, target)).flatten().nonzero()[0])
    x, t = (tensor.flatten()[first].item() for tensor in (input, target))
    _refuse(errors.position(first, input.shape), x, t)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy of logits, finite for any finite logit.

    .. math::
        \ell = -w\,(p\,t \log\sigma(x) + (1 - t) \log(1 - \sigma(x)))

    As :func:`torch.nn.functional.binary_cross_entropy_with_logits`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html).

    Args:
        input: logits x, of any shape.
        target: t, of the input's shape; in [0, 1], which is not checked.
        weight: w, broadcasts to the input's shape.
        size_average: deprecated, overrides `reduction`.
        reduce: deprecated, overrides `reduction`.
        reduction: 'none', 'mean' (over the number of elements, whatever the weight) or 'sum'.
        pos_weight: p, the weight of positive examples; broadcasts to the input's shape.

    Returns:
        A scalar, or the losses of all elements with 'none', in the target's type (float32 under
        autocast).

    Raises:
        ValueError: unknown `reduction`; a target of another shape.
        RuntimeError: devices that differ; a weight that does not broadcast; an integer target.
        NotImplementedError: integer or complex input.
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return handle_torch_function(
            binary_cross_entropy_with_logits,
            (input, target, weight, pos_weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
        )
    name = "binary_cross_entropy_with_logits"
    settings = (reduction,) if weight is size_average is reduce is pos_weight is None else None
    if settings and (known := repeat(name, (input, target, None), settings)) is not None:
        return known
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        errors.not_tensors(name, AttributeError, input=input, target=target)
    if not (weight is None or isinstance(weight, Tensor)):
        errors.not_tensors(name, TypeError, weight=weight)
    if not (pos_weight is None or isinstance(pos_weight, Tensor)):
        errors.not_tensors(name, TypeError, pos_weight=pos_weight)
    reduction = resolve(name, reduction, size_average, reduce)
    if target.shape != input.shape:
        errors.fail(
            ValueError,
            name,
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
            + advice.like_input(input, target),
        )
    if not (target.device == input.device and weight is None and pos_weight is None):
        errors.same_device(name, input=input, target=target, weight=weight, pos_weight=pos_weight)
    if not input.is_floating_point():
        hint = advice.swapped(input, target)
        errors.not_floating(name, NotImplementedError, "log_sigmoid_cpu", hint, input=input)
    errors.not_narrow(name, "log_sigmoid_cpu", NotImplementedError, input=input, target=target)
    if not target.is_floating_point():
        errors.not_floating(name, RuntimeError, name, target=target)
    if levels.strict():
        strict.check(name, input, target)
    if weight is not None:
        errors.expands(name, input.shape, weight=weight)
        weight = _floating(name, input, weight=weight)
    dtype = result_dtype(target.dtype, target)
    if pos_weight is None:
        call = PointwiseCall(BCE_WITH_LOGITS, (), reduction, None, dtype)
        return dispatch(name, call, (input, target, weight), settings=settings)
    errors.expands(name, input.shape, pos_weight=pos_weight)
    call = PointwiseCall(BCE_WITH_LOGITS_POS, (), reduction, None, dtype)
    pos_weight = _floating(name, input, pos_weight=pos_weight)
    return dispatch(name, call, (input, target, pos_weight, weight))


def _floating(name: str, input: Tensor, **given: Tensor) -> Tensor:
    """Integer weights are as good as others."""
    (weight,) = given.values()
    if weight.is_complex():
        errors.not_floating(name, RuntimeError, name, **given)
    if weight.is_floating_point():
        return weight
    check_memory(name, **given)
    return weight.to(input.dtype)


def _weight(tensors, generator):
    """Of the last dimension's size, so that it broadcasts."""
    return uniform(tensors[0].shape[-1:], tensors[0].dtype, generator, 0.1, 3)


def _example(shape, dtype, generator):
    return uniform(shape, dtype, generator, 0.01, 0.99), uniform(shape, dtype, generator, 0, 1)


def _logit_example(shape, dtype, generator):
    return 3 * normal(shape, dtype, generator), uniform(shape, dtype, generator, 0, 1)


register(
    Loss(
        binary_cross_entropy,
        "BCELoss",
        _example,
        {"plain": plain, "weight": lambda t, g: {"weight": _weight(t, g)}},
        extensions={"exact_grad": lambda t, g: {"exact_grad": True}},
        bench=(
            BenchCase("BCE 4M", (4096, 1024), at_most={"x - y": 1.7}),
            BenchCase("BCE 16M", (16384, 1024), group="beyond", at_most={"x - y": 0.6}),
            BenchCase("BCE 64M", (64, 1 << 20), group="gpu"),
            BenchCase("BCE 64M bf16", (64, 1 << 20), "bfloat16", group="gpu"),
        ),
    )
)
register(
    Loss(
        binary_cross_entropy_with_logits,
        "BCEWithLogitsLoss",
        _logit_example,
        {
            "plain": plain,
            "weight": lambda t, g: {"weight": _weight(t, g)},
            "pos_weight": lambda t, g: {"pos_weight": _weight(t, g)},
            "both": lambda t, g: {"weight": _weight(t, g), "pos_weight": _weight(t, g)},
        },
        bench=(
            BenchCase("BCE with logits 4M", (4096, 1024), compiled=True, at_most={"x - y": 1.7}),
            BenchCase("BCE with logits 16M", (16384, 1024), group="beyond", at_most={"x - y": 0.6}),
            BenchCase("BCE with logits 64M", (64, 1 << 20), group="gpu", compiled=True),
            BenchCase("BCE with logits 64M bf16", (64, 1 << 20), "bfloat16", group="gpu"),
        ),
    )
)
