"""The namespace `m` that formulas are written over, here as torch operations.

The C++ and Triton namespaces (`csrc/math.h`, `gpu/`) have the same names with the same meaning.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid as log_sigmoid

from ..core import sharded, torch_state
from .formula import Pointwise

__all__ = [
    "abs",
    "apply",
    "exp",
    "inf",
    "log",
    "log1p",
    "log_or_zero",
    "log_sigmoid",
    "maximum",
    "sigmoid",
    "where",
]


class OutsideDomain(Exception):
    """Some element lies where the formula is not defined."""


inf = float("inf")
exp = torch.exp
log = torch.log
log1p = torch.log1p
abs = torch.abs
sigmoid = torch.sigmoid
where = torch.where


def log_or_zero(a: Tensor) -> Tensor:
    """log a, but 0 at 0, with derivatives that are finite there."""
    return torch.log(torch.where(a == 0, 1.0, a))


def maximum(a: Tensor, b: float) -> Tensor:
    return torch.clamp_min(a, b)


def log_probabilities(x: Tensor, axis: int) -> Tensor:
    return sharded.log_softmax(x, axis) if sharded.is_sharded(x) else x.log_softmax(axis)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Of each row, the classes of `index`; both have the classes in dimension 1."""
    return sharded.chosen(x, index) if sharded.is_sharded(x) else x.gather(1, index)


def log_softmax(x: Tensor, axis: int) -> Tensor:
    """As torch's, but of a class near certainty from the others' share: torch gives 0 there."""
    log_p = log_probabilities(x, axis)
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


class _Traced(torch.autograd.Function):
    """`value` with `grad` as its derivative; this much of it torch.compile can trace."""

    @staticmethod
    def forward(formula: Pointwise, params: dict[str, float], *operands: Tensor) -> Tensor:
        return formula.value(*operands, **params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.formula, ctx.params = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.formula.grad(*ctx.saved_tensors, **ctx.params)
        needed = ctx.needs_input_grad[2:]
        rest = (None,) * (len(needed) - len(slopes))
        return (
            None,
            None,
            *(grads[0] * s if need else None for s, need in zip(slopes, needed, strict=False)),
            *rest,
        )


class _Formula(_Traced):
    """The same, mappable and with forward mode: differentiable to any order."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Traced.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def jvp(ctx: Any, _formula: None, _params: None, *tangents: Tensor | None) -> Tensor:
        slopes = ctx.formula.grad(*ctx.saved_tensors, **ctx.params)
        terms = [s * t for s, t in zip(slopes, tangents, strict=False) if t is not None]
        return sum(terms[1:], terms[0])


def apply(formula: Pointwise, operands: tuple[Tensor, ...], params: dict[str, float]) -> Tensor:
    """The losses of all elements, by torch operations; operands broadcast."""
    operands = torch.broadcast_tensors(*operands)
    check_domain(formula, operands, params)
    if torch.compiler.is_compiling():
        # It traces an autograd function where autograd runs, and maps none.
        if not torch_state.transforms_active() and _differentiated(operands):
            # Clones, which compilers drop: of what is changed later in the graph torch.compile would hand
            # backward the later values, and say nothing.
            return _Traced.apply(formula, params, *(o.clone() for o in operands))
        return formula.value(*operands, **params)
    if torch_state.is_tracing():
        return formula.value(*operands, **params)  # a saved trace holds no autograd function
    return _Formula.apply(formula, params, *operands)


def _differentiated(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def check_domain(
    formula: Pointwise, operands: tuple[Tensor, ...], params: dict[str, float]
) -> None:
    """RuntimeError where the formula is not defined; synchronises nothing, so that it traces."""
    if formula.domain is None or operands[0].device.type == "cuda":
        return  # a failed assertion on the GPU would take the CUDA context with it
    inside = formula.domain(*operands, **params)
    if sharded.is_sharded(inside):
        inside = sharded.whole(inside.all())
    transformed = torch_state.transforms_active()
    if torch.compiler.is_compiling():
        if transformed:
            return  # an assertion has no batching rule, and a traced tensor cannot be unwrapped
    elif transformed:
        while torch_state.is_wrapped(inside):
            inside = torch_state.unwrapped(inside)
    elif type(inside) is Tensor and inside.is_cpu and not torch_state.dispatch_modes():
        if not inside.all():
            raise OutsideDomain
        return
    torch_state.assert_async(inside.all(), formula.domain.__doc__ or "")
