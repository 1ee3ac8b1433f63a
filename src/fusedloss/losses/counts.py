"""Counts: the likelihood of a Poisson distribution."""

from __future__ import annotations

from ..front.definition import Bounds, elements, options, rates, row
from ..front.loss import loss
from ..front.operands import broadcast_target, promote_of_function
from ..front.pointwise import Elements
from ..kinds import torch_m as m
from ..kinds.formula import Pointwise


def poisson_of_log(x, t):
    return m.exp(x) - t * x


def poisson_of_log_grad(x, t):
    return m.exp(x) - t, -x


def poisson(x, t, *, eps):
    return x - t * m.log(x + eps)


def poisson_grad(x, t, *, eps):
    return 1.0 - t / (x + eps), -m.log(x + eps)


def poisson_of_log_full(x, t):
    return m.exp(x) - t * x + m.where(t > 1.0, (t + 0.5) * m.log(t) - t + 0.9189385332046727, 0.0)


def poisson_of_log_full_grad(x, t):
    return m.exp(x) - t, m.where(t > 1.0, m.log(t) + 0.5 / t, 0.0) - x


def poisson_full(x, t, *, eps):
    stirling = m.where(t > 1.0, (t + 0.5) * m.log(t) - t + 0.9189385332046727, 0.0)
    return x - t * m.log(x + eps) + stirling


def poisson_full_grad(x, t, *, eps):
    return 1.0 - t / (x + eps), m.where(t > 1.0, m.log(t) + 0.5 / t, 0.0) - m.log(x + eps)


POISSON_OF_LOG = Pointwise(poisson_of_log, poisson_of_log_grad)
POISSON = Pointwise(poisson, poisson_grad)
POISSON_OF_LOG_FULL = Pointwise(poisson_of_log_full, poisson_of_log_full_grad)
POISSON_FULL = Pointwise(poisson_full, poisson_full_grad)


CANCELS = Bounds(float32=(16, 4), float64=(16, 4), formula=(32, 4))  # where terms do so


OF_COUNTS = Elements(
    promote_of_function("log", first=True), shapes=broadcast_target, no_tensor=TypeError
)


@loss(
    "PoissonNLLLoss",
    Elements(
        promote_of_function("exp"),
        shapes=broadcast_target,
        no_tensor=TypeError,
        instead=lambda log_input, **_: None if log_input else OF_COUNTS,
    ),
    row(rates, options(log_input=False, full=True), bench=elements("Poisson"), bounds=CANCELS),
)
def poisson_nll_loss(log_input, full, eps):
    r"""Negative log likelihood of counts: :math:`\ell = e^x - t x`, or :math:`x - t \log(x + \epsilon)`.

    Args:
        input: the log of the expected count, or that count without `log_input`; of any shape.
        target: counts t; broadcasts with `input`.
        log_input: whether the input is a log.
        full: adds Stirling's :math:`t \log t - t + \log(2 \pi t) / 2` where t is above 1.
        eps: added to the input before its log is taken.
    """
    if log_input:
        return POISSON_OF_LOG_FULL if full else POISSON_OF_LOG
    return POISSON_FULL if full else POISSON, (eps,)
