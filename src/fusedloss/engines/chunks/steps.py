"""The steps over rows by torch operations, where there is no kernel: the formulas, differentiated."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.reduce import wide
from ...core.torch_state import differentiating
from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall, Rows, Slot


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
