"""Matching distributions: the Kullback-Leibler divergence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..core import advice, errors, levels
from ..core.reduce import REDUCTIONS, promoted, resolve, result_dtype
from ..front import strict
from ..front.definition import BenchCase, Loss, normal, register
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise
from ..kinds.pointwise import PointwiseCall
from ..route.dispatch import dispatch
from ..route.memo import repeat


def kl(x, t):
    return m.where((t == 0.0) & (x == x), 0.0, t * (m.log_or_zero(t) - x))


def kl_grad(x, t):
    return -t, m.where((t == 0.0) & (x == x), 0.0, m.log_or_zero(t) - x + 1.0)


KL = Pointwise(kl, kl_grad, linear=True)


# Below e^-80 the exp is taken e^64 times as large, and the product brought back: a subnormal number has too few
# digits to be multiplied.


def kl_log(x, t):
    finite = m.where(t == -m.inf, 0.0, t)
    raised = m.exp(m.where(finite < -80.0, finite + 64.0, finite)) * (finite - x)
    term = m.where(finite < -80.0, raised * 1.603810890548638e-28, raised)
    return m.where((t == -m.inf) & (x == x), 0.0, term)


def kl_log_grad(x, t):
    finite = m.where(t == -m.inf, 0.0, t)
    p = m.exp(m.where(finite < -80.0, finite + 64.0, finite))
    raised = p * (finite - x + 1.0)
    slope = m.where(finite < -80.0, raised * 1.603810890548638e-28, raised)
    share = m.where(finite < -80.0, p * 1.603810890548638e-28, p)
    return -m.where(t == -m.inf, 0.0, share), m.where((t == -m.inf) & (x == x), 0.0, slope)


KL_LOG = Pointwise(kl_log, kl_log_grad, linear=True)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence, a term an element: :math:`\ell = t\,(\log t - x)`.

    With `log_target`, :math:`\ell = e^t (t - x)`. As :func:`torch.nn.functional.kl_div`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.KLDivLoss.html), but 0 log 0 = 0 throughout:
    an element with target probability 0 contributes 0 to the value and to both gradients, even
    where x is -inf (PyTorch gives NaN).

    Args:
        input: log-probabilities x, of any shape.
        target: probabilities t, or their logs with `log_target`; broadcasts with `input`.
        size_average: deprecated, overrides `reduction`.
        reduce: deprecated, overrides `reduction`.
        reduction: 'none', 'batchmean' (over the size of dimension 0: the divergence), 'mean' (over the
            number of elements, with PyTorch's warning) or 'sum'.
        log_target: whether `target` holds logs.

    Returns:
        A scalar, or the terms of all elements with 'none', in the type that `input` and `target`
        promote to (float32 under autocast).

    Raises:
        ValueError: unknown `reduction`.
        RuntimeError: shapes that do not broadcast; devices that differ; integer or complex tensors.
        TypeError: an argument that is no tensor; a `log_target` that is no bool.
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            kl_div,
            (input, target),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            log_target=log_target,
        )
    name = "kl_div"
    plain = size_average is reduce is None and (log_target is False or log_target is True)
    settings = (reduction, log_target) if plain else None
    if settings and (known := repeat(name, (input, target, None), settings)) is not None:
        return known
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        errors.not_tensors(name, TypeError, input=input, target=target)
    errors.boolean(name, "log_target", log_target)
    if reduction == "mean" and size_average is None and reduce is None:
        errors.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release. "
            "kl_div: use reduction='batchmean', or divide a 'sum' yourself"
        )
        settings = None  # to warn again
    if reduction == "batchmean" and not (size_average is None and reduce is None):
        # What the legacy arguments give, divided by the batch size once more: as PyTorch does.
        legacy = resolve(name, reduction, size_average, reduce)
        result = kl_div(input, target, reduction=legacy, log_target=log_target)
        return result / input.shape[0] if input.dim() else result
    reduction = resolve(name, reduction, size_average, reduce, (*REDUCTIONS, "batchmean"))
    if target.device != input.device:
        errors.same_device(name, input=input, target=target)
    if not (input.is_floating_point() and target.is_floating_point()):
        argument, wrong = ("target", target) if input.is_floating_point() else ("input", input)
        kind = "Complex" if wrong.is_complex() else "Integral"
        hint = advice.swapped(input, target)
        if not (hint or wrong.is_complex()):
            hint = f": pass {argument}.float(), or class indices to nll_loss"
        words = f"{kind} inputs not supported: {argument} is {wrong.dtype}{hint}"
        errors.fail(RuntimeError, name, words)
    errors.not_narrow(name, "xlogy_cpu", input=input, target=target)
    if target.shape != input.shape:
        errors.broadcast(name, input=input, target=target)
    if levels.strict():
        strict.check(name, input, target, reduction=reduction, log_target=log_target)
    dtype = input.dtype
    if target.dtype != dtype:
        dtype = promoted(input, target)
    denominator = None
    if reduction == "batchmean":
        reduction, denominator = ("mean", input.shape[0]) if input.dim() else ("sum", None)
    formula = KL_LOG if log_target else KL
    call = PointwiseCall(formula, (), reduction, denominator, result_dtype(dtype, input))
    return dispatch(name, call, (input, target, None), settings=settings)


def _example(shape, dtype, generator):
    x, t = normal(shape, torch.float64, generator), normal(shape, torch.float64, generator)
    return x.log_softmax(-1).to(dtype), t.softmax(-1).to(dtype)


def _log_example(shape, dtype, generator):
    x, t = normal(shape, torch.float64, generator), normal(shape, torch.float64, generator)
    return x.log_softmax(-1).to(dtype), t.log_softmax(-1).to(dtype)


register(
    Loss(
        kl_div,
        "KLDivLoss",
        _example,
        reductions=("none", "batchmean", "mean", "sum"),
        bench=(
            BenchCase("KL 4M", (4096, 1024), at_most={"x - y": 1.15}),
            BenchCase("KL 16M", (16384, 1024), group="beyond", at_most={"x - y": 0.45}),
            BenchCase("KL 8192x32000", (8192, 32000), group="gpu", compiled=True),
            BenchCase("KL 8192x32000 bf16", (8192, 32000), "bfloat16", group="gpu"),
        ),
    )
)
register(
    Loss(
        kl_div,
        "KLDivLoss",
        _log_example,
        {"log_target": lambda tensors, generator: {"log_target": True}},
        reductions=("none", "batchmean", "mean", "sum"),
        variant="log_target",
        bench=(
            BenchCase("KL log_target 4M", (4096, 1024), at_most={"x - y": 1.7}),
            BenchCase("KL log_target 16M", (16384, 1024), group="beyond", at_most={"x - y": 0.6}),
        ),
    )
)
