"""Matching distributions: the Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import advice, errors
from ..core.reduce import REDUCTIONS, promoted
from ..front import strict
from ..front.definition import BenchCase, elements, normal, row
from ..front.loss import Definition, loss
from ..front.operands import Shapes, Types, broadcast
from ..front.pointwise import Elements, Reduction
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise


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


def _types(
    name: str, operands: dict[str, Tensor], _weight: Tensor | None, _shapes: Shapes
) -> torch.dtype:
    input, target = operands.values()
    if not (input.is_floating_point() and target.is_floating_point()):
        argument, wrong = ("target", target) if input.is_floating_point() else ("input", input)
        kind = "Complex" if wrong.is_complex() else "Integral"
        hint = advice.swapped(input, target)
        if not (hint or wrong.is_complex()):
            hint = f": pass {argument}.float(), or class indices to nll_loss"
        words = f"{kind} inputs not supported: {argument} is {wrong.dtype}{hint}"
        errors.fail(RuntimeError, name, words)
    errors.not_narrow(name, "xlogy_cpu", input=input, target=target)
    return input.dtype if target.dtype == input.dtype else promoted(input, target)


FLOATS = Types(
    _types,
    "in the type that `input` and `target` promote to",
    ("RuntimeError: integer or complex tensors",),
)


def _reduction(loss: Definition, given: dict[str, Any]) -> Reduction:
    reduction, legacy = given["reduction"], (given["size_average"], given["reduce"])
    if legacy != (None, None):
        # What the legacy arguments give, divided by the batch size once more: as PyTorch does.
        return Reduction(loss.reduction(given), by_batch=reduction == "batchmean")
    warning = ""
    if reduction == "mean" and given.get("denominator") is None:
        warning = (
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release. "
            "kl_div: use reduction='batchmean', or divide a 'sum' yourself"
        )
    return Reduction(loss.reduction(given, (*REDUCTIONS, "batchmean")), warning)


def _logs(shape, dtype, generator):
    x, t = normal(shape, torch.float64, generator), normal(shape, torch.float64, generator)
    return x.log_softmax(-1).to(dtype), t.log_softmax(-1).to(dtype)


def _probabilities(shape, dtype, generator):
    x, t = normal(shape, torch.float64, generator), normal(shape, torch.float64, generator)
    return x.log_softmax(-1).to(dtype), t.softmax(-1).to(dtype)


ALL = ("none", "batchmean", "mean", "sum")


@loss(
    "KLDivLoss",
    Elements(FLOATS, shapes=broadcast, no_tensor=TypeError, reduction=_reduction),
    row(
        _probabilities,
        reductions=ALL,
        bench=(
            *elements("KL", near=1.15, beyond=0.45, gpu=False),
            BenchCase("KL 8192x32000", (8192, 32000), group="gpu", compiled=True),
            BenchCase("KL 8192x32000 bf16", (8192, 32000), "bfloat16", group="gpu"),
        ),
    ),
    row(
        _logs,
        {"log_target": lambda tensors, generator: {"log_target": True}},
        reductions=ALL,
        variant="log_target",
        bench=elements("KL log_target", near=1.7, beyond=0.6, gpu=False),
    ),
    rules=(
        strict.same_shape,
        strict.no_mean_of_kl,
        strict.batch_is_all_rows,
        strict.target_is_number,
        strict.target_is_distribution,
        strict.input_is_log_probability,
    ),
)
def kl_div(log_target):
    r"""Kullback-Leibler divergence, a term an element: :math:`\ell = t\,(\log t - x)`.

    With `log_target`, :math:`\ell = e^t (t - x)`. As :func:`torch.nn.functional.kl_div`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.KLDivLoss.html), but 0 log 0 = 0 throughout:
    an element with target probability 0 contributes 0 to the value and to both gradients, even
    where x is -inf (PyTorch gives NaN).

    Args:
        input: log-probabilities x, of any shape.
        target: probabilities t, or their logs with `log_target`; broadcasts with `input`.
        reduction: 'none', 'batchmean' (over the size of dimension 0: the divergence), 'mean' (over the
            number of elements, with PyTorch's warning) or 'sum'.
        log_target: whether `target` holds logs.
    """
    return KL_LOG if log_target else KL
