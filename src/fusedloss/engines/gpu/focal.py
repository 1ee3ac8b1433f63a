"""The focal loss: what it makes of cross entropy's losses and gradients."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def powers(p, rest, surprise, gamma):
    """(1 - p)^gamma, and what the gradient p - 1 is multiplied by."""
    power = tl.where(rest == 0.0, 0.0, tl.exp(gamma * tl.log(tl.where(rest == 0.0, 1.0, rest))))
    ratio = tl.where(p == 0.0, 0.0, tl.where(rest == 0.0, 1.0, p * surprise / rest))
    return power, power * (gamma * ratio + 1.0)


@triton.jit
def focused(
    value, sums, own, total, certain, own_x, log_total, gamma, own_weight, counted
):  # fmt: skip
    """The losses, and the weights by which the gradients see the own classes: see csrc/focal.h; in float64."""
    _, origin, others, _, _, _, _ = sums
    sum = total.to(tl.float64)
    p, rest = own.to(tl.float64) / sum, others.to(tl.float64) / sum
    behind = tl.where(certain, 0.0, origin.to(tl.float64) - own_x.to(tl.float64))
    surprise = log_total.to(tl.float64) + behind
    power, slope = powers(p, rest, surprise, gamma)
    value = tl.where(counted, value * power, value).to(value.dtype)
    return value, tl.where(counted, own_weight * slope, 0.0).to(own_weight.dtype)
