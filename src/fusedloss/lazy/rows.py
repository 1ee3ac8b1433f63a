"""Rows of lazy logits chosen, and rows shaped: the hidden states are, likewise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .product import LOGITS, Lazy, Like
from .rules import contiguous, dim_of, liked, named, of_meta, rule, steps


@rule(Tensor.__getitem__)
def _getitem(lazy: Lazy, index: Any) -> Any:
    like, product = lazy.like, lazy.product
    entries = _entries(index, len(like.shape))
    if entries is None:
        return NotImplemented
    advanced = any(isinstance(e, Tensor) for e in entries)
    passed = place = k = (
        0  # dimensions of ours, dimensions made, entries before that of the classes
    )
    while k < len(entries) and (passed < like.at or entries[k] is None):
        passed += _takes(entries[k])
        place += entries[k] is None or isinstance(entries[k], slice)
        k += 1
    classes = entries[k] if k < len(entries) else None
    if passed != like.at or not isinstance(classes, slice):
        return NotImplemented
    if advanced and like.at != len(like.shape) - 1:
        return NotImplemented
    if classes != slice(None):
        if (
            len(range(*classes.indices(product.classes))) != product.classes
            and like.kind is not LOGITS
        ):
            return NotImplemented
        bias = None if product.bias is None else product.bias[classes]
        product = replace(product, weight=product.weight[classes], bias=bias)
    rows = (*entries[:k], *entries[k + 1 :])
    hidden = product.hidden[rows] if rows else product.hidden
    shape = list(hidden.shape[:-1])
    place = len(shape) if advanced else place
    shape.insert(place, product.classes)
    stride = contiguous(shape) if advanced else like.meta[entries].stride()
    like = replace(like, shape=torch.Size(shape), stride=stride, at=place)
    return lazy.made(like, lambda x: x[index], replace(product, hidden=hidden))


def _takes(entry: Any) -> int:
    """How many dimensions an entry of an index consumes."""
    if isinstance(entry, Tensor) and entry.dtype is torch.bool:
        return entry.dim()
    return 0 if entry is None else 1


def _entries(index: Any, dims: int) -> tuple[Any, ...] | None:
    """The index with an entry for each dimension, or None for what is not worth knowing."""
    entries = list(index) if isinstance(index, tuple) else [index]
    for k, entry in enumerate(entries):
        if isinstance(entry, list) and all(type(e) is int for e in entry):
            entries[k] = entry = torch.tensor(entry, dtype=torch.int64)
        if isinstance(entry, Tensor):
            if isinstance(entry, Lazy) or entry.dtype not in (torch.int64, torch.int32, torch.bool):
                return None
        elif entry is not None and entry is not Ellipsis and type(entry) not in (int, slice):
            return None
    taken = sum(_takes(e) for e in entries if e is not Ellipsis)
    dots = [k for k, e in enumerate(entries) if e is Ellipsis]
    if taken > dims or len(dots) > 1:
        return None
    where = dots[0] if dots else len(entries)
    return (*entries[:where], *(slice(None),) * (dims - taken), *entries[where + len(dots) :])


def _along(lazy: Lazy, dim: Any, entry: Any) -> Any:
    where = dim_of(lazy, dim)
    if where is None:
        return NotImplemented
    return _getitem(lazy, (*(slice(None),) * where, entry))


@rule(*named("select"))
def _select(lazy: Lazy, dim: Any, index: Any) -> Any:
    return _along(lazy, dim, index) if type(index) is int else NotImplemented


@rule(*named("narrow"))
def _narrow(lazy: Lazy, dim: Any, start: Any, length: Any) -> Any:
    where = dim_of(lazy, dim)
    if where is None or type(start) is not int or not 0 <= start <= lazy.like.shape[where] - length:
        return NotImplemented
    return _along(lazy, dim, slice(start, start + length))


@rule(*named("index_select"))
def _index_select(lazy: Lazy, dim: Any, index: Any) -> Any:
    """Its indices are not negative: torch's own word on them is that on the hidden states."""
    where, like = dim_of(lazy, dim), lazy.like
    if where in (None, like.at) or isinstance(index, Lazy):
        return NotImplemented
    hidden = lazy.product.hidden.index_select(where - (where > like.at), index)
    shape = [*like.shape[:where], index.numel(), *like.shape[where + 1 :]]
    like = replace(like, shape=torch.Size(shape), stride=contiguous(shape))
    made = replace(lazy.product, hidden=hidden)
    return lazy.made(like, lambda x: x.index_select(where, index), made)


@rule(*named("split"), torch.functional.split)
def _split(lazy: Lazy, split_size: Any, dim: int = 0) -> Any:
    where = dim_of(lazy, dim)
    if where is None or where == lazy.like.at:
        return NotImplemented
    length = lazy.like.shape[where]
    if isinstance(split_size, int):
        if split_size < 1:
            return NotImplemented
        split_size = [min(split_size, length - k) for k in range(0, max(length, 1), split_size)]
    if sum(split_size) != length:
        return NotImplemented
    ends = [sum(split_size[: k + 1]) for k in range(len(split_size))]
    return tuple(
        _along(lazy, where, slice(end - size, end))
        for size, end in zip(split_size, ends, strict=True)
    )


@rule(*named("chunk"))
def _chunk(lazy: Lazy, chunks: int, dim: int = 0) -> Any:
    where = dim_of(lazy, dim)
    if where is None or chunks < 1:
        return NotImplemented
    return _split(lazy, max(-(-lazy.like.shape[where] // chunks), 1), dim)


@rule(*named("unbind"))
def _unbind(lazy: Lazy, dim: int = 0) -> Any:
    where = dim_of(lazy, dim)
    if where is None or where == lazy.like.at:
        return NotImplemented
    return tuple(_along(lazy, where, k) for k in range(lazy.like.shape[where]))


@rule(Tensor.__iter__)
def _iter(lazy: Lazy) -> Any:
    found = _unbind(lazy)
    return found if found is NotImplemented else iter(found)


# Rows shaped.


def _reshapes(name: str) -> None:
    @rule(*named(name))
    def reshaped(lazy: Lazy, *args: Any, **kwargs: Any) -> Any:
        if (args and isinstance(args[0], torch.dtype)) or "dtype" in kwargs:
            return NotImplemented
        step = steps(name, args, kwargs)
        meta = of_meta(lazy, step)
        at = None if meta is None else _classes_in(lazy.like, meta.shape)
        if meta is None or at is None:
            return NotImplemented
        hidden = lazy.product.hidden
        hidden = hidden.reshape(*meta.shape[:at], *meta.shape[at + 1 :], hidden.shape[-1])
        return lazy.made(liked(lazy, meta, at=at), step, replace(lazy.product, hidden=hidden))


def _classes_in(like: Like, shape: torch.Size) -> int | None:
    """Where the classes stand in a new shape that leaves each row whole, or None."""
    before, after = math.prod(like.shape[: like.at]), math.prod(like.shape[like.at + 1 :])
    for at, size in enumerate(shape):
        if (
            size == like.shape[like.at]
            and math.prod(shape[:at]) == before
            and math.prod(shape[at + 1 :]) == after
        ):
            return at
    return None


for _name in (
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
):
    _reshapes(_name)


def _permutes(name: str, *functions: Any) -> None:
    @rule(*(functions or named(name)))
    def permuted(lazy: Lazy, *args: Any, **kwargs: Any) -> Any:
        step = steps(name, args, kwargs)
        meta = of_meta(lazy, step)
        if meta is None:
            return NotImplemented
        dims, at = meta.dim(), lazy.like.at
        names = torch.empty_strided((1,) * dims, tuple(range(1, dims + 1)), device="meta")
        order = [stride - 1 for stride in step(names).stride()]
        rows = [k - (k > at) for k in order if k != at]
        hidden = lazy.product.hidden.permute(*rows, dims - 1)
        like = liked(lazy, meta, at=order.index(at))
        return lazy.made(like, step, replace(lazy.product, hidden=hidden))


for _name in ("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t"):
    _permutes(_name)
_permutes("t", Tensor.T.__get__)  # type: ignore[attr-defined]
_permutes("adjoint", Tensor.mT.__get__)  # type: ignore[attr-defined]
