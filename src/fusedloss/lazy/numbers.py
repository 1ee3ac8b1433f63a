"""Casts, scales, soft caps and biases of lazy logits, which a head has settings for, and their softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..core import torch_state
from ..core.reduce import autocasts
from .product import LOG_PROBS, LOGITS, P_LOG_P, P_X, PROBS, Lazy, Like, Product, Step
from .rules import DATA, dim_of, liked, named, of_meta, rule, steps
from .tensor import EITHER, RULES, LazyLogits, computed, root_of
from .tensor import lazy as lazy_of

MASKED = -1e4  # a class whose logit is at most this has no probability, whatever is added to it

# The same numbers.


def _casts(name: str) -> None:
    @rule(*named(name))
    def cast(lazy: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(lazy, Lazy):
            return NotImplemented
        if not all(_stays(lazy, each) for each in (*args, *kwargs.values())):
            return NotImplemented
        given = [_on_meta(a) for a in args if type(a) is not int]
        kinds = {k: _on_meta(v) for k, v in kwargs.items()}
        meta = of_meta(lazy, steps(name, given, kinds))
        if meta is None or not meta.dtype.is_floating_point:
            return NotImplemented
        return lazy.made(liked(lazy, meta), steps(name, args, kwargs))


def _stays(lazy: Lazy, argument: Any) -> bool:
    """Whether an argument of `to` and its like leaves the device as it is."""
    if isinstance(argument, Tensor):
        argument = argument.device
    if type(argument) is int:
        argument = torch.device("cuda", argument)
    if isinstance(argument, str):
        try:
            argument = torch.device(argument)
        except RuntimeError:
            return False
    if not isinstance(argument, torch.device):
        return True
    own = lazy.product.hidden.device
    return argument.type == own.type and argument.index in (None, own.index)


def _on_meta(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return torch.empty(0, dtype=argument.dtype, device="meta")
    return "meta" if isinstance(argument, (str, torch.device)) else argument


for _name in ("contiguous", "to", "float", "double", "half", "bfloat16", "type_as", "clone"):
    _casts(_name)


def _without_moving(kind: str, function: Any) -> None:
    @rule(function)
    def stayed(lazy: Lazy, *args: Any, **kwargs: Any) -> Any:
        return lazy if lazy.product.hidden.device.type == kind and not args else NotImplemented


_without_moving("cpu", Tensor.cpu)
_without_moving("cuda", Tensor.cuda)


@rule(Tensor.type)
def _type(lazy: Lazy, dtype: Any = None, **_: Any) -> Any:
    return RULES[Tensor.to](lazy, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


@rule(*named("detach"), DATA)
def _detach(lazy: Lazy) -> Any:
    with torch.no_grad():
        return lazy.made(lazy.like, Tensor.detach, lazy.product.detached)


def _makes(name: str) -> None:
    """A new tensor of this type and device."""
    function = getattr(Tensor, name)

    @rule(function)
    def new(lazy: Lazy, *args: Any, **kwargs: Any) -> Any:
        empty = torch.empty(0, dtype=lazy.like.dtype, device=lazy.product.hidden.device)
        return function(empty, *args, **kwargs)


for _name in ("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"):
    _makes(_name)


# Other numbers, which a head has settings for.


def _number(value: Any) -> float | None:
    """A finite number, or one in a tensor that nobody waits for."""
    if isinstance(value, Tensor):
        free = (
            not value.dim() and value.is_cpu and not value.requires_grad and not value.is_complex()
        )
        if isinstance(value, Lazy) or not free or torch_state.is_compiling():
            return None
        value = value.item()
    if type(value) not in (int, float) or not math.isfinite(value):
        return None
    return float(value)


def _scaled(lazy: Lazy, factor: float, like: Like, step: Step) -> Any:
    product = lazy.product
    if like.kind is not LOGITS:
        return lazy.made(replace(like, factor=like.factor * factor), step)
    scaled = factor * (product.cap or product.scale)
    if not 0 < scaled < math.inf:
        return NotImplemented
    if product.cap:
        return lazy.made(like, step, replace(product, cap=scaled))
    return lazy.made(like, step, replace(product, scale=scaled))


def _scaled_by_tensor(lazy: Lazy, other: Any, inverse: bool, like: Like, step: Step) -> Any:
    """By a 0-dim tensor that learns, or that is not looked at: it is multiplied into the rows."""
    product = lazy.product
    if not isinstance(other, Tensor) or isinstance(other, Lazy) or not other.is_floating_point():
        return NotImplemented
    if like.kind is not LOGITS or product.cap:
        return NotImplemented
    by = other.to(product.hidden.dtype)
    by = by.reciprocal() if inverse else by
    bias = None if product.bias is None else product.bias * by
    return lazy.made(like, step, replace(product, hidden=product.hidden * by, bias=bias), other)


def _multiplies(function: Any, inverse: bool) -> None:
    @rule(function)
    def multiplied(first: Any, second: Any, **kwargs: Any) -> Any:
        of_first = isinstance(first, Lazy)
        lazy, other = (first, second) if of_first else (second, first)
        if kwargs or (inverse and not of_first):
            return NotImplemented
        if isinstance(other, Lazy):
            return NotImplemented if inverse else _product_of_two(first, second, function)
        if isinstance(other, Tensor) and other.dim():
            return NotImplemented
        at_meta = torch.empty_like(other, device="meta") if isinstance(other, Tensor) else other

        def step_by(x: Tensor, by: Any) -> Tensor:
            return function(x, by) if of_first else function(by, x)

        meta = of_meta(lazy, lambda x: step_by(x, at_meta))
        if meta is None or not meta.dtype.is_floating_point:
            return NotImplemented
        like, number = liked(lazy, meta), _number(other)
        if number is None:
            return _scaled_by_tensor(lazy, other, inverse, like, lambda x: step_by(x, other))
        if inverse and not number:
            return NotImplemented
        factor = 1 / number if inverse else number
        return _scaled(lazy, factor, like, lambda x: step_by(x, other))

    if not inverse:
        EITHER.add(function)


for _found in (*named("mul"), *named("multiply"), Tensor.__mul__, Tensor.__rmul__):
    _multiplies(_found, inverse=False)
for _name in ("div", "divide", "true_divide", "__truediv__"):
    for _found in named(_name):
        _multiplies(_found, inverse=True)


def _product_of_two(first: Lazy, second: Lazy, function: Any) -> Any:
    """p log p and p x of the same rows, whose sums over the classes are known."""
    p, other = (first, second) if first.like.kind is PROBS else (second, first)
    kind = {LOG_PROBS: P_LOG_P, LOGITS: P_X}.get(other.like.kind)
    if kind is None or p.like.kind is not PROBS or p.product is not other.product:
        return NotImplemented
    if p.like.at != other.like.at:
        return NotImplemented
    meta = of_meta(p, lambda x: function(x, other.like.meta))
    if meta is None:
        return NotImplemented
    like = liked(p, meta, kind=kind, factor=p.like.factor * other.like.factor)
    # Computed in full, it is made anew of the one that both were made of.
    others = root_of(other).product.tensors if isinstance(other, LazyLogits) else ()
    return p.made(
        like, lambda x: function(x, x.log() if kind is P_LOG_P else _full(other)), None, *others
    )


def _full(lazy: Any) -> Tensor:
    return computed(lazy, "mul")


@rule(*named("neg"), *named("negative"), Tensor.__neg__)
def _neg(lazy: Lazy) -> Any:
    return _scaled(lazy, -1.0, lazy.like, torch.neg)


@rule(*named("tanh"), F.tanh)
def _tanh(lazy: Lazy) -> Any:
    if lazy.like.kind is not LOGITS or lazy.product.cap:
        return NotImplemented
    return lazy.made(lazy.like, torch.tanh, replace(lazy.product, cap=1.0))


def _adds(function: Any, sign: float) -> None:
    @rule(function)
    def added(first: Any, second: Any, **kwargs: Any) -> Any:
        of_first = isinstance(first, Lazy)
        lazy, other = (first, second) if of_first else (second, first)
        if kwargs or (sign < 0 and not of_first):
            return NotImplemented
        if isinstance(other, Lazy):
            return _sum_of_two(first, second) if sign > 0 else NotImplemented
        more = _of_classes(lazy, other)
        if more is None:
            return NotImplemented
        product = lazy.product
        more = more.to(product.hidden.dtype) * (sign / product.scale)
        bias = more if product.bias is None else product.bias + more
        meta = of_meta(lazy, lambda x: function(x, torch.empty_like(other, device="meta")))
        if meta is None:
            return NotImplemented
        return lazy.made(
            liked(lazy, meta), lambda x: function(x, other), replace(product, bias=bias), other
        )

    if sign > 0:
        EITHER.add(function)


def _sum_of_two(first: Lazy, second: Lazy) -> Any:
    """Of a head and its adapter: one product, of features side by side."""
    a, b = first.product, second.product
    if not (
        first.like == second.like
        and first.like.kind is LOGITS
        and first.like.at == len(first.like.shape) - 1
        and first.like.dtype == a.hidden.dtype == b.hidden.dtype
        and not (a.cap or b.cap)
    ):
        return NotImplemented
    hidden = torch.cat([a.hidden * a.scale, b.hidden * b.scale], -1)
    biases = [p.bias * p.scale for p in (a, b) if p.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    return lazy_of(Product(hidden, torch.cat([a.weight, b.weight], -1), bias))


def _of_classes(lazy: Lazy, other: Any) -> Tensor | None:
    """A tensor with a number for each class and nothing else, as (C)."""
    like, product = lazy.like, lazy.product
    if not isinstance(other, Tensor) or isinstance(other, Lazy):
        return None
    if like.kind is not LOGITS or product.cap or other.is_complex():
        return None
    where = like.at - (len(like.shape) - other.dim())
    if where < 0 or where >= other.dim() or other.device != product.hidden.device:
        return None
    if other.numel() != product.classes or other.shape[where] != product.classes:
        return None
    return other.reshape(-1)


for _found in (*named("add"), Tensor.__add__, Tensor.__radd__):
    _adds(_found, 1.0)
for _found in (*named("sub"), *named("subtract"), Tensor.__sub__):
    _adds(_found, -1.0)


@rule(*named("masked_fill"))
def _masked_fill(lazy: Lazy, mask: Any, value: Any) -> Any:
    number, of = _number_or_infinity(value), _of_classes(lazy, mask)
    if of is None or number is None or not number <= MASKED:
        return NotImplemented
    product = lazy.product
    bias = product.bias
    if bias is None:
        bias = torch.zeros(product.classes, dtype=product.hidden.dtype, device=of.device)
    weight = product.weight
    if number != -math.inf:  # what a mask hides gets no gradient
        if math.prod(product.rows) < product.hidden.shape[-1]:
            return NotImplemented  # a copy of the weight is larger than the logits
        weight = weight.masked_fill(of.unsqueeze(-1), 0)
        least = torch.finfo(bias.dtype).min
        number = max(number, least * min(product.scale, 1.0))
    product = replace(product, weight=weight, bias=bias.masked_fill(of, number / product.scale))
    return lazy.made(lazy.like, lambda x: x.masked_fill(mask, value), product)


def _number_or_infinity(value: Any) -> float | None:
    return -math.inf if value == -math.inf and type(value) is float else _number(value)


# Softmax, and what stays of it.


def _normalises(kind: str, function: Any) -> None:
    @rule(function)
    def normalised(
        lazy: Lazy, dim: Any = None, *args: Any, dtype: Any = None, _stacklevel: int = 3
    ) -> Any:
        like = lazy.like
        dtype = next((a for a in args if isinstance(a, torch.dtype)), dtype)
        if like.kind is not LOGITS or dim_of(lazy, dim) != like.at:
            return NotImplemented
        if dtype is not None and not dtype.is_floating_point:
            return NotImplemented
        of = dtype or like.dtype
        if dtype is None and autocasts(lazy.product.hidden.device.type):
            of = torch.promote_types(of, torch.float32)
        return lazy.made(
            replace(like, dtype=of, kind=kind), lambda x: function(x, dim, dtype=dtype)
        )


for _found in (F.log_softmax, *named("log_softmax")):
    _normalises(LOG_PROBS, _found)
for _found in (F.softmax, *named("softmax")):
    _normalises(PROBS, _found)


@rule(*named("exp"))
def _exp(lazy: Lazy) -> Any:
    if lazy.like.kind is not LOG_PROBS or lazy.like.factor != 1.0:
        return NotImplemented
    return lazy.made(replace(lazy.like, kind=PROBS), torch.exp)


@rule(*named("log"))
def _log(lazy: Lazy) -> Any:
    if lazy.like.kind is not PROBS or lazy.like.factor != 1.0:
        return NotImplemented
    return lazy.made(replace(lazy.like, kind=LOG_PROBS), torch.log)


def _reverses(function: Any, forward: Any) -> None:
    """`other - lazy` by its own rules, which dynamo says for `lazy - other` too, with the first two swapped."""
    EITHER.add(function)
    direct = RULES[forward]

    @rule(function)
    def reverse(first: Any, second: Any) -> Any:
        return direct(second, first) if not isinstance(first, Lazy) else NotImplemented


_reverses(Tensor.__rsub__, Tensor.__sub__)
_reverses(Tensor.__rtruediv__, Tensor.__truediv__)
