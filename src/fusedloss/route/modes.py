"""Under a dispatch mode a head is one operator: who counts, keeps or recomputes operators meets no logits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..autograd.operators import HEAD, TEACHER
from ..core import torch_state

COUNTER = "torch.utils.flop_counter"  # it imports Triton: only where somebody has done so
Shape = Sequence[int]


def gap() -> str | None:
    """Why a mode that is active needs the formula, or None."""
    if torch_state.mode_traces():
        return "a TorchDispatchMode traces"
    if not all(map(_counts, torch_state.modes())):
        return "a FlopCounterMode knows the operators of torch alone"
    return None


def _counts(mode: Any) -> bool:
    """Whether a mode, if it counts floating-point operations, counts those of a head; it learns to."""
    if type(mode).__module__ != COUNTER:
        return True
    registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
    if not isinstance(registry, dict):
        return False
    for name, formula in FLOPS.items():
        known = sys.modules[COUNTER].shape_wrapper(formula)
        registry.setdefault(getattr(torch.ops.fusedloss, name), known)
    return True


def _products(tensors: Sequence[Any], needed: Sequence[bool]) -> int:
    """Multiplications and additions of the logits, and of the gradients by the first two tensors."""
    (n, features), (classes, heads, _) = tensors[:2]
    found = 2 * n * classes * heads * features * (1 + sum(needed[:2]))
    teacher: Shape | None = tensors[len(HEAD)] if len(tensors) > len(HEAD) else None
    return found + (0 if teacher is None else 2 * n * classes * teacher[1])


def _formulas(name: str, count: int) -> dict[str, Callable[..., int]]:
    def forward(*arguments: Any, out_shape: Any = None) -> int:
        return _products(arguments[:count], arguments[count])

    def backward(
        incoming: Any, arrived: Any, needed: Any, *given: Any, out_shape: Any = None
    ) -> int:
        return _products(given[:count], needed)

    return {name: forward, f"{name}_backward": backward}


FLOPS = {
    **_formulas("linear", len(HEAD)),
    **_formulas("distill", len(HEAD) + len(TEACHER)),
}
