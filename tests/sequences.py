"""CTC as PyTorch defines it, by sums of probabilities: its derivatives are all those of the formula.

PyTorch's own has none of the second order, and in its first adds exp(x) (docs/compatibility.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def projected(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss as the gradients of PyTorch are right: that of CTC after log_softmax alone."""

    def after(x: Tensor, *rest: Any, **settings: Any) -> Tensor:
        return function(x.log_softmax(-1), *rest, **settings)

    return after if name == "ctc_loss" else function


def function_of(face: Any, name: str) -> Callable[..., Tensor]:
    return projected(name, getattr(face, name))


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    alone = log_probs.dim() == 2
    p = (log_probs.unsqueeze(1) if alone else log_probs).double().exp()
    losses, begin = [], 0
    counts = target_lengths.flatten().tolist()
    for n, (frames, count) in enumerate(zip(input_lengths.flatten().tolist(), counts, strict=True)):
        row = targets[n] if targets.dim() == 2 else targets[begin:]
        begin += count
        states = [blank]
        for label in row[:count].tolist():
            states += [label, blank]
        share = [torch.ones_like(p[0, 0, 0])] + [torch.zeros_like(p[0, 0, 0])] * (2 * count)
        for t in range(frames):
            share = [
                sum(share[k] for k in leading(states, s)) * p[t, n, state]
                for s, state in enumerate(states)
            ]
        losses.append(-sum(share[-2:]).log())
    result = torch.stack(losses)
    if zero_infinity:
        result = torch.where(result == torch.inf, 0, result)
    if reduction == "mean":
        result = (result / target_lengths.flatten().clamp(min=1)).mean()
    elif reduction == "sum":
        result = result.sum()
    elif alone:
        result = result[0]
    autocast = torch.is_autocast_enabled("cpu") and log_probs.dtype.itemsize == 2
    return result.to(torch.float32 if autocast else log_probs.dtype)


def leading(states: list[int], s: int) -> list[int]:
    """The states from which an alignment comes to this one."""
    skips = s > 1 and s % 2 and states[s] != states[s - 2]
    return [k for k in (s, s - 1, *((s - 2,) if skips else ())) if k >= 0]
