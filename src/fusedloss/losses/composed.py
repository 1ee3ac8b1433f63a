"""What PyTorch's users write of losses that it lacks, or lacks derivatives of: what ours are compared with.

Those of heads have the logits in full, those of margins all gaps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(N, C)."""
    x = F.linear(input, linear_weight, linear_bias)
    x = (x if scale == 1 else scale * x).reshape(-1, x.shape[-1])
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    x = logits(input, linear_weight, linear_bias, softcap, logit_scale)
    probabilities = target.is_floating_point()
    y = target.reshape(x.shape if probabilities else -1)
    kept = torch.ones_like(x[:, 0]) if probabilities else (y != ignore_index).to(x.dtype)
    settings: dict[str, Any] = {} if probabilities else {"ignore_index": ignore_index}
    losses = F.cross_entropy(
        x, y, weight, reduction="none", label_smoothing=label_smoothing, **settings
    )
    if z_loss:
        losses = losses + z_loss * x.logsumexp(1).square() * kept
    if weight is not None and not probabilities:
        kept = kept * weight[torch.where(y == ignore_index, 0, y)]
    return reduced(losses, kept, input, sample_weight, reduction)


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "none",
) -> Tensor:
    x = logits(input, linear_weight, linear_bias, softcap) / temperature
    y = target.reshape(-1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    losses = -F.cross_entropy(wide, y, reduction="none", ignore_index=ignore_index)
    return reduced(losses, torch.ones_like(losses), input, None, reduction)


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    target: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    x = logits(input, linear_weight, linear_bias, softcap)
    if teacher_logits is None:
        assert teacher_input is not None and teacher_weight is not None
        teacher_logits = F.linear(teacher_input, teacher_weight, teacher_bias)
    teacher = teacher_logits.detach().reshape(x.shape)
    if teacher_softcap is not None:
        teacher = teacher_softcap * torch.tanh(teacher / teacher_softcap)
    s, t = (x / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="none", log_target=True).sum(1)

    if divergence == "js":
        m = (beta * t.exp() + (1 - beta) * s.exp()).log()
        losses = beta * kl(t, m) + (1 - beta) * kl(s, m)
    else:
        losses = kl(t, s) if divergence == "forward" else kl(s, t)
    losses, kept = soft_weight * losses, torch.ones_like(losses)
    if target is not None:
        y = target.reshape(-1)
        kept = (y != ignore_index).to(x.dtype)
        hard = F.cross_entropy(x, y, reduction="none", ignore_index=ignore_index)
        losses = torch.where(y == ignore_index, 0, losses) + hard_weight * hard
    return reduced(losses, kept, input, sample_weight, reduction)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    dim = min(input.dim() - 1, 1)
    log_p = input.log_softmax(dim)
    t = torch.tanh(log_p / 2)  # 1 - p is -expm1(log p), which ONNX lacks
    rest = (-2 * t / (1 - t)).clamp_min(torch.finfo(input.dtype).tiny)
    log_p = rest**gamma * log_p
    kept = target != ignore_index
    hard = F.nll_loss(log_p, target, weight, ignore_index=ignore_index, reduction=reduction)
    if not label_smoothing:
        return hard
    each = 1.0 if weight is None else weight.reshape(-1, *(1,) * max(input.dim() - 2, 0))
    flat = torch.where(kept.reshape(log_p.select(dim, 0).shape), -(log_p * each).mean(dim), 0)
    if reduction != "none":
        flat = flat.sum()
    if reduction == "mean":
        counts = kept if weight is None else weight[target[kept].long()]
        flat = flat / counts.sum()
    return (1 - label_smoothing) * hard + label_smoothing * flat.reshape(hard.shape)


def dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str = "softmax",
    overlap: str = "dice",
    alpha: float = 0.5,
    beta: float = 0.5,
    generalized: str = "none",
    include_background: bool = True,
    batch: bool = False,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    skip_absent: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    p = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid, "none": lambda x: x}[
        activation
    ](input)
    kept = target != ignore_index
    if target.shape == input.shape:
        t = target.to(p.dtype)
    else:
        index = torch.where(kept, target, 0).long()
        t = F.one_hot(index, input.shape[1]).movedim(-1, 1).to(p.dtype)
        kept = kept.unsqueeze(1)
    p, t = (each * kept for each in (p, t))
    dims = [*([0] if batch else []), *range(2, p.dim())]
    sums = [p * t, p, t]
    if dims:
        sums = [s.sum(dims) for s in sums]
    first = 0 if include_background else 1
    both, ours, theirs = (s[..., first:] for s in sums)
    if overlap == "dice":
        above, below = 2 * both, ours + theirs
    elif overlap == "jaccard":
        above, below = both, ours + theirs - both
    else:
        above, below = both, both + alpha * (ours - both) + beta * (theirs - both)
    own = 1.0 if weight is None else weight[first:]
    if generalized != "none":
        power = {"square": 2, "simple": 1, "uniform": 0}[generalized]
        w = 1 / theirs**power
        finite = torch.where(w.isinf(), 0, w)
        w = own * torch.where(w.isinf(), finite.amax(-1, keepdim=True), w)
        losses = 1 - ((w * above).sum(-1) + smooth_nr) / ((w * below).sum(-1) + smooth_dr)
    else:
        below = below + smooth_dr
        losses = own * torch.where(
            below == 0, 0, 1 - (above + smooth_nr) / torch.where(below == 0, 1, below)
        )
        if skip_absent:
            losses = losses * (theirs > 0)
    return losses if reduction == "none" else getattr(losses, reduction)()


def dice_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    **overlap: Any,
) -> Tensor:
    settings: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    dice = dice_loss(input, target, weight, **settings, **overlap)
    return lambda_dice * dice + lambda_ce * F.cross_entropy(input, target, weight, **settings)


def dice_focal(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    **overlap: Any,
) -> Tensor:
    settings: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    dice = dice_loss(input, target, weight, **settings, **overlap)
    focal = softmax_focal_loss(input, target, weight, gamma=gamma, **settings)
    return lambda_dice * dice + lambda_focal * focal


def reduced(
    losses: Tensor, kept: Tensor, input: Tensor, sample_weight: Tensor | None, reduction: str
) -> Tensor:
    if sample_weight is not None:
        losses = losses * sample_weight.reshape(-1)
    if reduction == "none":
        return losses.reshape(input.shape[:-1])
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    x, y = rows_of(input), target.reshape(-1, 1)
    gaps = (margin - x.gather(1, y) + x).clamp(min=0)
    gaps = gaps * gaps if p == 2 else gaps
    if weight is not None:
        gaps = gaps * weight.to(x.dtype)[y]
    own = y == torch.arange(x.shape[1], device=x.device)
    losses = torch.where(own, 0, gaps).mean(1).reshape(target.shape).to(input.dtype)
    return losses if reduction == "none" else getattr(losses, reduction)()


def multilabel_margin_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    x, y = rows_of(input), rows_of(target)
    counted = (y == -1).long().cumsum(1) == 0
    index = torch.where(counted, y, 0)
    classes = torch.arange(x.shape[1], device=x.device)
    labels = ((index.unsqueeze(2) == classes) & counted.unsqueeze(2)).any(1, keepdim=True)
    gaps = (1 - x.gather(1, index).unsqueeze(2) + x.unsqueeze(1)).clamp(min=0)
    terms = torch.where(counted.unsqueeze(2) & ~labels, gaps, 0)
    losses = (terms.sum((1, 2)) / x.shape[1]).reshape(input.shape[:-1]).to(input.dtype)
    return losses if reduction == "none" else getattr(losses, reduction)()


def rows_of(tensor: Tensor) -> Tensor:
    """In float32 at least, if it is no target."""
    rows = tensor if tensor.dim() > 1 else tensor.reshape(1, -1)
    floating = tensor.is_floating_point()
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) if floating else rows


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    kept = torch.ones_like(target) if ignore_index is None else target != ignore_index
    x, t = torch.where(kept.bool(), input, 0), smoothed(target, label_smoothing)
    losses = F.binary_cross_entropy_with_logits(
        x, t, weight, pos_weight=pos_weight, reduction="none"
    )
    return of_elements(losses, kept, sample_weight, reduction)


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """As torchvision's, with these options."""
    kept = torch.ones_like(target) if ignore_index is None else target != ignore_index
    x = torch.where(kept.bool(), input, 0)
    t = smoothed(torch.where(kept.bool(), target, 0), label_smoothing)
    p = torch.sigmoid(x)
    losses = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    losses = losses * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    if alpha >= 0:
        losses = losses * (alpha * t + (1 - alpha) * (1 - t))
    return of_elements(losses, kept, sample_weight, reduction)


def smoothed(target: Tensor, label_smoothing: float) -> Tensor:
    return target * (1 - label_smoothing) + label_smoothing / 2


def of_elements(
    losses: Tensor, kept: Tensor, sample_weight: Tensor | None, reduction: str
) -> Tensor:
    if sample_weight is not None:
        ones = (1,) * (losses.dim() - sample_weight.dim())
        losses = losses * sample_weight.reshape((*sample_weight.shape, *ones)).to(losses)
    losses = torch.where(kept.bool(), losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()
