"""A formula of all that formulas are written with; as a script, its results by Triton, interpreted."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from fusedloss.kinds import torch_m as m
from fusedloss.kinds.formula import Pointwise
from fusedloss.kinds.pointwise import PointwiseCall


def everything(x, t, w, v, *, a, b, c, d):
    far = (x != t) | (x > 2.0)
    sign = m.where(far, m.where((x < t) & (x >= -c), 0.9, 0.1), m.where(b > 0.0, 0.3, m.inf))
    size = m.maximum(m.abs(x - t), 0.05) + m.maximum(0.05, t) + m.maximum(x, m.sqrt(m.abs(w)))
    logs = m.log(size) - m.log1p(size * size) + m.log_or_zero(t)
    power = m.pow(m.at_least(v, c), a)
    return sign * (logs + m.exp(-(size / a))) * power * w + b * v - m.where(t == 0.0, -1, d)


def everything_grad(x, t, w, v, *, a, b, c, d):
    product = -x * w
    head = m.where(product <= c, 1.0 / 3.0, m.maximum(v, d))
    return (
        head * m.sigmoid(product) * m.exp(-m.abs(v)),
        m.where((t <= 0.0) | (w > a), -m.inf, m.where(t != v, a - b, c * 0.7)),
        m.log_sigmoid(x * w) - 2.0 * v,
        m.where(x == t, 0.1, -0.2) * m.pow(m.abs(w), b),
    )


def everything_domain(x, t, w, v, *, a, b, c, d):
    """everything: x must be finite"""
    return (x == x) & (x < m.inf) & (x > -m.inf)


EVERYTHING = Pointwise(everything, everything_grad, domain=everything_domain)
NUMBERS = (1.7, 0.9, 0.3, 0.15)
DERIVATIVES = ((0,), (1,), (0, 1), (2,), (0, 2), (1, 3), (0, 1, 2, 3))


def operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Such that comparisons come out both ways, and equal; one is broadcast, one has gaps."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(37, 53, generator=generator, dtype=dtype)
    t = torch.rand(37, 53, generator=generator, dtype=dtype)
    t[:, ::5] = 0
    x[::3] = t[::3]
    w = torch.rand(53, 37, generator=generator, dtype=dtype).t() * 3
    v = torch.rand(53, generator=generator, dtype=dtype)
    return x, t, w, v


def calls(dtype: torch.dtype) -> Iterator[tuple[PointwiseCall, tuple[Tensor | None, ...]]]:
    weight = torch.linspace(0.5, 2, 53, dtype=dtype)
    for reduction in ("none", "sum", "mean"):
        call = PointwiseCall(EVERYTHING, NUMBERS, reduction, None, dtype)
        yield call, (*operands(dtype), weight if reduction == "mean" else None)


def needed(derivatives: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(k in derivatives for k in range(4))


def main(path: str) -> None:
    from fusedloss.engines.gpu import interpreter
    from fusedloss.engines.gpu.pointwise import PointwiseEngine

    interpreter.mend()
    kernel = PointwiseEngine()
    found = []
    for dtype in (torch.float32, torch.float64):
        for call, tensors in calls(dtype):
            for derivatives in DERIVATIVES[-2:]:
                wanted = needed(derivatives)
                result, grads = kernel.forward(call, tensors, wanted)
                again = kernel.backward(call, tensors, wanted, torch.ones_like(result))
                found.append([result, *grads, *again])
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
