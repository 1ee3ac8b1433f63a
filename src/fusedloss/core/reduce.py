"""Reductions: the argument with its legacy forms, and the formula's last step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import torch_state
from .errors import fail, truth, warn

PART = 1 << 17  # elements
REDUCTIONS = ("none", "mean", "sum")


def resolve(
    function: str,
    reduction: str,
    size_average: bool | None = None,
    reduce: bool | None = None,
    allowed: tuple[str, ...] = REDUCTIONS,
) -> str:
    """The reduction that is meant; `size_average` and `reduce` override it, and warn.

    Raises:
        ValueError: `reduction` is none of `allowed`.
    """
    if size_average is not None or reduce is not None:
        for argument, value in (("size_average", size_average), ("reduce", reduce)):
            truth(function, argument, value)
        legacy = torch_state.legacy_reduction(size_average, reduce, emit_warning=False)
        warn(
            "size_average and reduce args will be deprecated, please use "
            f"reduction='{legacy}' instead."
        )
        return legacy
    if reduction in allowed:
        return reduction
    if reduction == "elementwise_mean":
        warn("reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.")
        return "mean"
    expected = ", ".join(repr(name) for name in allowed)
    fail(
        ValueError,
        function,
        f"{reduction} is not a valid value for reduction; expected one of {expected}",
    )


def total(losses: Tensor, reduction: str, denominator: Tensor | float | None = None) -> Tensor:
    """Reduces unreduced losses; 'mean' divides by `denominator` (see `sum_of`), or by their number."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if denominator is None else losses.sum() / denominator


def sum_of(weights: Tensor) -> Tensor:
    """What 'mean' divides by: a count of rows, or a sum of weights of any type, in float64."""
    return weights.sum(dtype=exact(weights))


def count_other(tensor: Tensor, value: float) -> Tensor:
    """How many elements are not `value`; of a plain tensor in parts, so that no condition is held in full."""
    parts: tuple[Tensor, ...] = (tensor,)
    if type(tensor) is Tensor and tensor.dim() and not torch_state.is_compiling():
        parts = tensor.split(max(1, PART // max(1, tensor.shape[1:].numel())))
    counts = (torch.count_nonzero(part.to(wide(part)) != value).to(exact(part)) for part in parts)
    return functools.reduce(torch.add, counts)


def wide(*tensors: Tensor) -> torch.dtype:
    """The type to compute in: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def exact(tensor: Tensor) -> torch.dtype:
    """The type of counts, sums of weights and their quotients: float64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def promoted(*tensors: Tensor) -> torch.dtype:
    """`torch.result_type` (torch.compile cannot trace it): a 0-dim tensor yields to its kind."""
    first, *others = tensors
    dtype, array = first.dtype, first.dim() > 0
    for t in others:
        other, own = t.dtype, t.dim() > 0
        if (
            dtype == other
            or array == own
            or _kind(other if array else dtype) > _kind(dtype if array else other)
        ):
            dtype = torch.promote_types(dtype, other)
        elif own:
            dtype = other
        array = array or own
    return dtype


def _kind(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else int(dtype != torch.bool)


def result_dtype(dtype: torch.dtype, tensor: Tensor) -> torch.dtype:
    """`dtype`, or float32 under autocast, which runs every loss in it."""
    if dtype not in (torch.bfloat16, torch.float16) or not torch_state.any_autocast():
        return dtype
    return torch.float32 if autocasts(tensor.device.type) else dtype


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; torch knows none for meta tensors."""
    return device != "meta" and torch.is_autocast_enabled(device)
