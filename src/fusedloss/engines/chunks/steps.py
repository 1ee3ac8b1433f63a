"""The steps over rows by torch operations, where there is no kernel: the formulas, differentiated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core import reduce
from ...core.reduce import wide
from ...core.torch_state import differentiating
from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall, Rows, Slot, capped, scaled
from ..abi import LINEAR_SUMS

# Of the sums of a row, as csrc/linear.h has them.
MAX, OTHERS, OWN, OWN_X, DOT, MASS, TOP, PRODUCTS = range(LINEAR_SUMS)


def step(
    call: LinearCall,
    logits: Tensor,
    target: Tensor,
    weight: Slot,
    results: Rows,
    incoming: Rows | None = None,
    grad_target: Slot = None,
) -> None:
    """Fills `results` from a chunk (n, C) of logits; with `incoming` it becomes its gradient.

    `target` is (n) or (n, C); `results` and `incoming` hold a number for each row.
    """
    with torch.no_grad() if incoming is None else differentiating():
        x = logits.detach().to(wide(logits)).requires_grad_(incoming is not None)
        q = target.detach().requires_grad_(grad_target is not None)
        rows = call.rows(x.unsqueeze(2), q.unsqueeze(-1), weight)
        found = [t.squeeze(1) if t is not None else None for t in rows]
    for whole, part in zip(results, found, strict=True):
        if whole is not None and part is not None:
            whole.copy_(part)
    if incoming is None:
        return
    pairs = [
        (t, g.to(t.dtype))
        for t, g in zip(found, incoming, strict=True)
        if t is not None and g is not None
    ]
    wanted = [x] if grad_target is None else [x, q]
    grads = torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs])
    logits.copy_(grads[0])
    if grad_target is not None:
        grad_target.copy_(grads[1])


def distill(
    call: DistillCall,
    logits: Tensor,
    teacher: Tensor,
    target: Slot,
    results: Rows,
    incoming: Rows | None = None,
) -> None:
    """The same for the divergence from a teacher's logits (n, C)."""
    with torch.no_grad() if incoming is None else differentiating():
        x = logits.detach().to(wide(logits)).requires_grad_(incoming is not None)
        losses = call.divergences(x, teacher.detach(), target)
    results.loss.copy_(losses.detach())
    if incoming is not None:
        logits.copy_(torch.autograd.grad(losses, x, incoming.loss.to(x.dtype))[0])


def gather(call: LinearCall, logits: Tensor, target: Tensor, weight: Slot) -> Tensor:
    """What `csrc/linear.h` gathers of rows (n, C) of a shard's logits, (n, 8); its exps are not raised."""
    assert call.shard is not None
    x = logits_of(call, logits)
    found = x.new_zeros(x.shape[0], LINEAR_SUMS, dtype=reduce.exact(x))
    if not x.shape[1]:
        found[:, TOP] = -math.inf
        return found
    top = x.amax(1)
    origin = torch.where(top == -math.inf, 0, top)
    gaps = x - origin.unsqueeze(1)
    e = gaps.exp()
    if call.probabilities:
        at, here = x.argmax(1), top != -math.inf
    else:
        at, here = own_class(call, target, x)
    at = at.unsqueeze(1)
    own = e.gather(1, at).squeeze(1)
    found[:, MAX], found[:, TOP] = origin.to(found.dtype), top.to(found.dtype)
    found[:, OWN] = torch.where(here, own, 0).to(found.dtype)
    if not call.probabilities:
        found[:, OWN_X] = torch.where(here, x.gather(1, at).squeeze(1), 0).to(found.dtype)
    found[:, PRODUCTS] = torch.where(e == 0, 0, e * gaps).sum(1, dtype=found.dtype)
    e.scatter_(1, at, torch.where(here, 0, own).unsqueeze(1))
    found[:, OTHERS] = e.sum(1, dtype=found.dtype)
    part = _soft(call, x, target, weight)
    if part is not None:
        found[:, MASS] = part.sum(1, dtype=found.dtype)
        absent = (part == 0) & ~x.isnan()
        found[:, DOT] = torch.where(absent, 0, part * gaps).sum(1, dtype=found.dtype)
    return found


def merge(call: LinearCall, parts: Tensor) -> Tensor:
    """Of the sums (k, n, 8) of k processes those of all."""
    top = parts[..., TOP].amax(0)
    origin = torch.where(top == -math.inf, 0, top)
    gaps = torch.where(parts[..., MAX] == origin, 0, parts[..., MAX] - origin)
    totals = parts[..., OTHERS] + parts[..., OWN]
    factors = torch.where(totals == 0, 0, gaps.exp())
    own, masses = factors * parts[..., OWN], parts[..., MASS]
    if not call.probabilities:
        is_own = torch.ones_like(own, dtype=torch.bool)
    else:  # that of the first process with the largest logit
        first = (parts[..., TOP] == top).to(torch.int8).argmax(0)
        ranks = torch.arange(parts.shape[0], device=parts.device)
        is_own = ranks.unsqueeze(1) == first
    products = factors * (parts[..., PRODUCTS] + gaps * totals)
    moved = torch.where(masses == 0, 0, masses * gaps)
    columns = {
        MAX: origin,
        OTHERS: (factors * parts[..., OTHERS] + torch.where(is_own, 0, own)).sum(0),
        OWN: torch.where(is_own, own, 0).sum(0),
        OWN_X: parts[..., OWN_X].sum(0),
        DOT: (parts[..., DOT] + moved).sum(0),
        MASS: masses.sum(0),
        TOP: top,
        PRODUCTS: torch.where(factors > 0, products, 0).sum(0),
    }
    return torch.stack([columns[k] for k in range(LINEAR_SUMS)], 1)


def finish(
    call: LinearCall,
    logits: Tensor,
    target: Tensor,
    weight: Slot,
    results: Rows,
    incoming: Rows | None,
    grad_target: Slot,
    sums: Tensor,
) -> None:
    """As `step`, of rows of a shard's logits whose sums over all classes are known."""
    largest, _, own, own_x, dot, mass, top, products = sums.unbind(1)
    total, log_sum, own_weight, counted = _of_rows(call, target, weight, sums)
    lse, mean_x = largest + log_sum, products / total
    loss = own_weight * (log_sum + torch.where(own == 1, 0, largest - own_x))
    if call.probabilities or call.smoothing:
        loss = mass * log_sum - dot + loss
    if call.z_loss:
        loss = loss + call.z_loss * lse.square()
    found = (loss, lse, log_sum - mean_x, (own_x == top).to(loss.dtype))
    for whole, part in zip(results, found, strict=True):
        if whole is not None:
            whole.copy_(part if counted is None else torch.where(counted, part, 0))
    if incoming is not None and logits.shape[1]:
        _differentiate(call, logits, target, weight, incoming, grad_target, sums)


def _differentiate(
    call: LinearCall,
    logits: Tensor,
    target: Tensor,
    weight: Slot,
    incoming: Rows,
    grad_target: Slot,
    sums: Tensor,
) -> None:
    """The gradient is p (even + tilted (x - max)) - g b."""
    largest, others, own, own_x, _, mass, _, products = sums.unbind(1)
    total, log_sum, own_weight, counted = _of_rows(call, target, weight, sums)
    x = logits_of(call, logits)
    gaps = x - largest.unsqueeze(1).to(x.dtype)
    g = incoming.loss.to(sums.dtype)
    if grad_target is not None:
        by = (g * (1 - call.smoothing)).unsqueeze(1).to(x.dtype)
        slope = by * (log_sum.unsqueeze(1).to(x.dtype) - gaps)
        grad_target.copy_(slope if weight is None else slope * _of_shard(call, weight))
    zero = torch.zeros_like(g)
    arriving = (zero if t is None else t.to(sums.dtype) for t in incoming[1:3])
    of_lse, of_entropy = (t * call.logit_scale for t in arriving)
    g = g * call.logit_scale
    rest = g * (mass + 2 * call.z_loss * (largest + log_sum)) + of_lse
    rest = rest + of_entropy * products / total
    even, tilted = (g * own_weight + rest) / total, -of_entropy / total
    e = gaps.exp()
    slope = e * even.unsqueeze(1).to(x.dtype)
    if incoming.entropy is not None:
        slope += torch.where(e == 0, 0, e * gaps * tilted.unsqueeze(1).to(x.dtype))
    soft = _soft(call, x, target, weight)
    if soft is not None:
        slope -= g.unsqueeze(1).to(x.dtype) * soft
    if not call.probabilities:
        # p - 1 as minus the others' share: exact where p is near 1.
        at, here = own_class(call, target, x)
        share, at = own / total, at.unsqueeze(1)
        bend = torch.where(share > 0, -of_entropy * (own_x - largest) * share, 0)
        certainly = rest * share + bend - g * own_weight * (others / total)
        if soft is not None:
            certainly -= g * soft.gather(1, at).squeeze(1)
        before = slope.gather(1, at).squeeze(1)
        slope.scatter_(1, at, torch.where(here, certainly.to(x.dtype), before).unsqueeze(1))
    if call.softcap:
        bent = x / call.softcap
        slope *= (1 - bent) * (1 + bent)
    logits.copy_(slope if counted is None else torch.where(counted.unsqueeze(1), slope, 0))


def _of_rows(
    call: LinearCall, target: Tensor, weight: Slot, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor, Slot]:
    """The sums of exps and their logs, what the target's class weighs by itself, and which rows count."""
    total = sums[:, OTHERS] + sums[:, OWN]
    log_sum = log_sum_of(sums[:, OTHERS], sums[:, OWN])
    own_weight = torch.zeros_like(total)
    if not call.probabilities:
        own_weight += 1 - call.smoothing
        if weight is not None:
            own_weight *= weight[target.clamp(0, weight.shape[0] - 1)]
    return total, log_sum, own_weight, call.counted(target)


def log_sum_of(others: Tensor, own: Tensor) -> Tensor:
    return torch.where(own == 1, torch.log1p(others), (others + own).log())


def logits_of(call: LinearCall, logits: Tensor) -> Tensor:
    return capped(scaled(logits.to(wide(logits)), call.logit_scale), call.softcap)


def own_class(call: LinearCall, target: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row where in the shard its class is, and whether it is there."""
    assert call.shard is not None
    at = target - call.shard.first
    here = (at >= 0) & (at < x.shape[1]) & (target != call.ignore_index)
    return at.clamp(0, x.shape[1] - 1), here


def _soft(call: LinearCall, x: Tensor, target: Tensor, weight: Slot) -> Slot:
    """What each of the shard's classes counts in the loss, but for the target's own share of an index."""
    assert call.shard is not None
    flat = call.smoothing / max(call.shard.classes, 1)
    if call.probabilities:
        part = (1 - call.smoothing) * target.to(x.dtype) + flat
    elif call.smoothing:
        part = torch.full_like(x, flat)
    else:
        return None
    return part if weight is None else part * _of_shard(call, weight)


def _of_shard(call: LinearCall, weight: Tensor) -> Tensor:
    """The weights of the shard's classes."""
    assert call.shard is not None
    return weight.narrow(0, call.shard.first, call.shard.count)
