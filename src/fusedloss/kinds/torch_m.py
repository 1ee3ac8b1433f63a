"""The namespace `m` that formulas are written over (`names.py`), here as torch operations."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import torch
from torch import Tensor

from .names import CONSTANTS, FUNCTIONS


class OutsideDomain(Exception):
    """Some element lies where the formula is not defined."""


inf = float("inf")
exp = torch.exp
log = torch.log
log1p = torch.log1p
abs = torch.abs
log_sigmoid = torch.nn.functional.logsigmoid
pow = torch.pow
sigmoid = torch.sigmoid
sqrt = torch.sqrt
where = torch.where


def log_or_zero(a: Tensor) -> Tensor:
    """log a, but 0 at 0, with derivatives that are finite there."""
    return torch.log(torch.where(a == 0, 1.0, a))


def maximum(a: Tensor | float, b: Tensor | float) -> Tensor:
    if not isinstance(b, Tensor):
        assert isinstance(a, Tensor)
        return torch.clamp_min(a, b)
    return torch.maximum(a, b) if isinstance(a, Tensor) else torch.clamp_min(b, a)


def at_least(a: Tensor, b: float) -> Tensor:
    return torch.where(a < b, b + (a - a.detach()), a)


def _where(
    dtype: torch.dtype, condition: Tensor | bool, a: Tensor | float, b: Tensor | float
) -> Tensor | float:
    if isinstance(condition, bool):  # of numbers alone
        return a if condition else b
    if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        a = torch.full_like(
            condition, a, dtype=dtype
        )  # torch takes two numbers for its default type
    return torch.where(condition, a, b)


# By what a formula computes in.
NAMESPACES = {
    dtype: SimpleNamespace(
        **{name: globals()[name] for name in (*FUNCTIONS, *CONSTANTS) if name != "where"},
        where=functools.partial(_where, dtype),
    )
    for dtype in (torch.float32, torch.float64)
}


def others_of(log_p: Tensor) -> Tensor:
    """1 - p with its digits; ONNX has no expm1."""
    t = torch.tanh(0.5 * log_p)
    return -2.0 * t / (1.0 - t)


def log_softmax(x: Tensor, axis: int) -> Tensor:
    """As torch's, but of a class near certainty from the others' share: torch gives 0 there."""
    log_p = x.log_softmax(axis)
    if x.is_nested:  # nested tensors broadcast nothing
        return log_p
    certain = log_p > -0.5  # one class of a row at most
    own = torch.where(certain, x, 0).sum(axis, keepdim=True)
    others = certain.any(axis, keepdim=True) & ~certain
    gaps = torch.where(others, x - own, -inf)
    edge = math.log(torch.finfo(x.dtype).tiny) + 27
    # Where all of them are small they are summed e^60 times as large: subnormal numbers have fewer digits.
    lift = torch.where((gaps > edge).any(axis, keepdim=True), 0.0, 60.0).to(x.dtype)
    share = (gaps + lift).exp().sum(axis, keepdim=True) * (-lift).exp()
    return torch.where(certain, -torch.log1p(share), log_p)
