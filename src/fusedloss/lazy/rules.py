"""What the rules of lazy logits share, and what is asked of a tensor beside its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core import torch_state
from .product import Lazy, Like, Step, described
from .tensor import ASKED, RULES, root_of

Rule = Callable[..., Any]
METADATA = (
    *("dim", "ndimension", "numel", "nelement", "size", "stride", "is_contiguous", "__len__"),
    *("element_size", "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg"),
    "storage_offset",
)
METADATA_PROPERTIES = ("shape", "dtype", "ndim", "itemsize", "nbytes", "layout", "names")
OWN = ("get_device", "is_inference", "__hash__", "is_shared")
OWN_PROPERTIES = (
    *("requires_grad", "grad_fn", "is_leaf", "device", "is_cuda", "is_cpu", "is_meta", "is_sparse"),
    *("is_nested", "is_quantized", "is_mkldnn", "is_mps", "is_xpu", "is_sparse_csr", "is_xla"),
    *("retains_grad", "_version", "_base", "output_nr", "is_ipu", "is_maia", "is_vulkan"),
)
DATA = vars(Tensor.__base__)["data"].__get__
REFUSALS = (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError)


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    def add(handler: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return add


def named(name: str) -> list[Any]:
    """The method, and torch's function of the same name."""
    found = (getattr(where, name, None) for where in (Tensor, torch))
    return [each for each in found if callable(each)]  # torch.float is a type


def _answers(function: Any, by_shape: bool) -> None:
    ASKED.add(function)

    @rule(function)
    def answer(lazy: Any, *args: Any, **kwargs: Any) -> Any:
        return function(lazy.like.meta if by_shape else lazy, *args, **kwargs)


for _name in METADATA:
    for _found in named(_name):
        _answers(_found, by_shape=True)
for _name in OWN:
    _answers(getattr(Tensor, _name), by_shape=False)
for _name in (*METADATA_PROPERTIES, *OWN_PROPERTIES):
    if hasattr(Tensor, _name):
        _answers(getattr(Tensor, _name).__get__, by_shape=_name in METADATA_PROPERTIES)


@rule(Tensor.__repr__)
def _repr(lazy: Lazy, **_: Any) -> str:
    return described(lazy)


@rule(Tensor.__format__)
def _format(lazy: Lazy, spec: str = "") -> Any:
    return NotImplemented if spec else described(lazy)


@rule(Tensor.register_hook)
def _register_hook(lazy: Any, hook: Any) -> Any:
    """FSDP's wants to know that a gradient comes; another one wants the gradient."""
    if not torch_state.of_fsdp(hook):
        return NotImplemented
    root_of(lazy).awaited.append(hook)
    return Tensor.register_hook(lazy, hook)


def of_meta(lazy: Lazy, step: Step) -> Tensor | None:
    """What a step makes of the shape, or None where torch refuses it."""
    try:
        return step(lazy.like.meta)
    except REFUSALS:
        return None


def liked(lazy: Lazy, meta: Tensor, **changes: Any) -> Like:
    return replace(lazy.like, shape=meta.shape, stride=meta.stride(), dtype=meta.dtype, **changes)


def contiguous(shape: Any) -> tuple[int, ...]:
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def dim_of(lazy: Lazy, dim: Any) -> int | None:
    dims = len(lazy.like.shape)
    return dim % dims if isinstance(dim, int) and -dims <= dim < dims else None


def steps(method: str, args: Any, kwargs: Any) -> Step:
    return lambda x: getattr(x, method)(*args, **kwargs)
