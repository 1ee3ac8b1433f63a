"""The checks of a loss of vectors, whose features are the last dimension; of the triplet losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core import errors
from ..core.reduce import result_dtype
from ..kinds.reduction import Distances, Reduction, ReductionCall
from ..route.dispatch import dispatch
from . import docs
from .loss import Definition
from .signature import Memo

RAISES = (
    "ValueError: unknown `reduction`",
    "RuntimeError: numbers of dimensions that differ; shapes that do not broadcast; devices that differ",
    "TypeError: an argument that is no tensor",
)


class Norms(NamedTuple):
    """p-norms of differences, and a loss of these."""

    record: Reduction
    p: float
    eps: float
    margin: float

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        assert isinstance(self.record.measure, Distances)
        return self.record.measure.pairs


@dataclass(frozen=True)
class Triplets:
    """Anchor, positive and negative; the definition's function gives the settings of the distance."""

    kind: ClassVar[str] = "triplet"
    computes: ClassVar[bool] = False

    def memo(self, loss: Definition) -> Memo:
        return loss.memo(weighted=False)

    def run(self, loss: Definition, memo: tuple[Any, ...] | None, given: dict[str, Any]) -> Tensor:
        reduction, settings = loss.reduction(given), loss.checked(given)
        operands = loss.tensors(given, TypeError)
        check(loss.name, **operands)
        tensors = tuple(operands.values())
        return run(loss.name, tensors, loss.body(**settings), reduction, memo)

    def words(self, loss: Definition) -> docs.Words:
        returns = (
            "A scalar, or the losses of all triplets with 'none', in the type that the inputs promote to "
            "(float32 under autocast)."
        )
        return docs.Words(returns, (*RAISES, "RuntimeError: the inf norm of no coordinates"))


def check(name: str, anchor: Tensor, positive: Tensor, negative: Tensor) -> None:
    if not anchor.device == positive.device == negative.device:
        errors.same_device(name, anchor=anchor, positive=positive, negative=negative)
    if not anchor.dim() == positive.dim() == negative.dim():
        errors.fail(
            RuntimeError,
            name,
            "The anchor, positive, and negative tensors are expected to have the same number of "
            f"dimensions, but got: anchor {anchor.dim()}D, positive {positive.dim()}D, and negative "
            f"{negative.dim()}D inputs",
        )


def run(
    name: str,
    tensors: tuple[Tensor, ...],
    norms: Norms,
    reduction: str,
    memo: tuple[Any, ...] | None = None,
) -> Tensor:
    anchor, positive, negative = tensors
    errors.not_narrow(name, "add_stub", anchor=anchor, positive=positive, negative=negative)
    dtype = anchor.dtype
    if not anchor.shape == positive.shape == negative.shape:
        errors.broadcast(name, anchor=anchor, positive=positive, negative=negative)
    for other in tensors[1:]:
        if other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    if dtype != anchor.dtype or dtype != positive.dtype or dtype != negative.dtype:
        # The distance of two integer tensors has the default type, whatever the third is.
        for pair in norms.pairs:
            if not any(tensors[k].is_floating_point() or tensors[k].is_complex() for k in pair):
                dtype = torch.promote_types(dtype, torch.get_default_dtype())
    if dtype.is_complex:
        dtype = dtype.to_real()
    elif not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    if norms.p == math.inf and anchor.dim() and 0 in {t.shape[-1] for t in tensors}:
        errors.fail(
            RuntimeError,
            name,
            "linalg.vector_norm cannot compute the inf norm on the last dimension because it is empty",
        )
    why = None if anchor.dim() else "the inputs are 0-dim"
    if anchor.dim() and not anchor.shape[-1] == positive.shape[-1] == negative.shape[-1]:
        why = "the features broadcast"  # each distance is taken over those of its own two tensors
    dtype = result_dtype(dtype, anchor)
    numbers = (float(norms.p), float(norms.eps), norms.margin)
    call = ReductionCall(norms.record.name, numbers, reduction, dtype)
    return dispatch(name, call, tensors, why, memo)
