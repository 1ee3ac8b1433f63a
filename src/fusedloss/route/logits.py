"""Losses of rows of which a process has a shard of the classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..autograd import functions as autograd
from ..core import reduce
from ..core.indices import check_range
from ..core.shards import ClassShard
from ..kinds.heads import Slot
from ..kinds.logits import LogitsCall
from ..kinds.rows import RowsCall
from . import heads
from .reasons import by_formula, formula_reason
from .shards import Scaled

OUTSIDE = -100  # of the shard


def run(
    call: RowsCall,
    shard: ClassShard,
    input: Tensor,
    target: Tensor,
    weight: Slot = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """The loss of a shard's logits, or log-probabilities."""
    denominator = call.denominator if denominator is None else denominator
    if not call.softmax:
        return _likelihood(call, shard, input, target, weight, denominator)
    compute = reduce.wide(input, target) if call.probabilities else reduce.wide(input)
    if compute is not reduce.wide(input):
        input = input.to(compute)
    x = _as_rows(input)
    own = LogitsCall(
        loss=call.loss,
        probabilities=call.probabilities,
        reduction=call.reduction,
        ignore_index=call.ignore_index,
        smoothing=call.smoothing,
        z_loss=0.0,
        softcap=0.0,
        logit_scale=1.0,
        statistics=False,
        memory_budget=0,
        chunk_rows=0,
        exact_logits=False,
        dtype=call.dtype,
        shard=shard,
    )
    of_rows = _as_rows(target) if call.probabilities else target.reshape(-1)
    number = x.new_empty(x.shape[1], 1, 0)
    if not (denominator is None or isinstance(denominator, Tensor)):
        denominator = torch.full((), denominator, dtype=torch.float64)
    tensors = (x, number, None, of_rows.unsqueeze(-1), weight, None, denominator)
    (result,) = heads.results(own, tensors, target)
    return result.reshape(call.shape(input, target)) if call.reduction == "none" else result


def _as_rows(x: Tensor) -> Tensor:
    """(N, C) of (C), (N, C) or (N, C, d1, ...)."""
    return x.unsqueeze(0) if x.dim() == 1 else x.movedim(1, -1).flatten(0, -2)


def _likelihood(
    call: RowsCall,
    shard: ClassShard,
    input: Tensor,
    target: Tensor,
    weight: Slot,
    denominator: Tensor | float | None,
) -> Tensor:
    """Each process has the log-probabilities of some rows' labels, and the others' are no rows to it."""
    check_range(call.loss, target, shard.classes, call.ignore_index)
    label = target.to(torch.int64)
    here = (
        (label >= shard.first) & (label < shard.first + shard.count) & (label != call.ignore_index)
    )
    reduction = "none" if call.reduction == "none" else "sum"
    own = replace(
        call, reduction=reduction, ignore_index=OUTSIDE, dtype=reduce.exact(input), denominator=None
    )
    mine = None if weight is None else weight.narrow(0, shard.first, shard.count)
    given = (input, torch.where(here, label - shard.first, OUTSIDE), mine)
    why = formula_reason(own, given)
    part = by_formula(own, given) if why else autograd.run(call.loss, own, given)
    found = shard.total(part)
    if denominator is not None:
        found = found / denominator
    elif call.reduction == "mean":
        count = call.count((input, target, weight))
        found = Scaled.apply(found, 1 / count, call.of_nothing)
    return found.to(call.dtype)
