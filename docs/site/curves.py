"""What the picture of each loss shows: one of its inputs moves, the others stand still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plots import Curve, Plot
from torch import Tensor

from fusedloss import functional as F
from fusedloss import nn

NONE: dict[str, Any] = {"reduction": "none"}


def against(name: str, target: float, **settings: Any) -> Curve:
    """A loss of elements, of the abscissa and a target that stands still."""
    return lambda x: getattr(F, name)(x, torch.full_like(x, target), **settings, **NONE)


def logits(x: Tensor, classes: int) -> Tensor:
    """Rows whose class 0 has the abscissa for its logit, and the others 0."""
    return torch.cat([x[:, None], x.new_zeros(len(x), classes - 1)], 1)


def of_class(name: str, classes: int, **settings: Any) -> Curve:
    function = getattr(F, name)
    return lambda x: function(
        logits(x, classes), torch.zeros(len(x), dtype=torch.int64), **settings, **NONE
    )


def labelled(labels: tuple[int, ...]) -> Curve:
    def curve(x: Tensor) -> Tensor:
        row = torch.tensor([*labels, *[-1] * (4 - len(labels))])
        return F.multilabel_margin_loss(logits(x, 4), row.expand(len(x), 4), **NONE)

    return curve


def negative_at(function: Callable[..., Tensor], **settings: Any) -> Curve:
    """Anchor at 0, positive at 1 and negative at the abscissa, on a line."""

    def curve(x: Tensor) -> Tensor:
        a = x.new_zeros(len(x), 1)
        return function(a, a + 1, x[:, None], **settings, **NONE)

    return curve


def at_angle(x: Tensor) -> Tensor:
    return torch.stack([x.cos(), x.sin()], 1)


def cosine(target: float, margin: float = 0.0) -> Curve:
    def curve(x: Tensor) -> Tensor:
        first = at_angle(torch.zeros_like(x))
        given = x.new_full((len(x),), target)
        return F.cosine_embedding_loss(first, at_angle(x), given, margin=margin, **NONE)

    return curve


def half_right(x: Tensor) -> tuple[Tensor, Tensor]:
    """An image for each abscissa: two places a class, of which each has this logit before the other's 0."""
    target = torch.tensor([[0, 0, 1, 1]]).expand(len(x), 4)
    own = x[:, None].expand(-1, 4)
    zero = torch.zeros_like(own)
    scores = torch.where(target == 0, own, zero), torch.where(target == 1, own, zero)
    return torch.stack(scores, 1), target


def overlap(name: str, **settings: Any) -> Curve:
    """Image by image: what is reduced over images is asked of each alone."""

    def curve(x: Tensor) -> Tensor:
        function, each = getattr(F, name), [half_right(one) for one in x.split(1)]
        return torch.stack([function(scores, target, **settings) for scores, target in each])

    return curve


def sequence(frames: int) -> Curve:
    """One label in so many frames; the abscissa is its logit, the blank's is 0."""

    def curve(x: Tensor) -> Tensor:
        scores = torch.stack([torch.zeros_like(x), x], 1).log_softmax(1)
        n = len(x)
        lengths = torch.full((n,), frames), torch.ones(n, dtype=torch.int64)
        log_p = scores.expand(frames, n, 2)
        return F.ctc_loss(log_p, torch.ones(n, 1, dtype=torch.int64), *lengths, **NONE)

    return curve


def head(name: str, sign: float = 1.0, **settings: Any) -> Curve:
    """A head of three classes whose weight is the unit matrix: the logits are those of `logits`."""

    def curve(x: Tensor) -> Tensor:
        weight, target = torch.eye(3, dtype=x.dtype), torch.zeros(len(x), dtype=torch.int64)
        return sign * getattr(F, name)(logits(x, 3), weight, target, **settings)

    return curve


def in_clusters(of_cluster: bool) -> Curve:
    """Two frequent classes and a cluster of two rare ones; the abscissa is the logit of class 0, or of the cluster."""

    def curve(x: Tensor) -> Tensor:
        module = nn.AdaptiveLogSoftmaxWithLoss(3, 4, [2], div_value=1.0, dtype=x.dtype)
        with torch.no_grad():
            module.head.weight.copy_(torch.eye(3))
            module.tail[0][1].weight.zero_()
        at = 2 if of_cluster else 0
        target = torch.full((len(x),), at)
        return -module(logits(x, 3).roll(at, 1), target).output

    return curve


def from_teacher(**settings: Any) -> Curve:
    """The teacher's logits are 2, 0, 0."""

    def curve(x: Tensor) -> Tensor:
        teacher = logits(torch.full_like(x, 2.0), 3)
        weight = torch.eye(3, dtype=x.dtype)
        return F.linear_kl_div(logits(x, 3), weight, teacher_logits=teacher, **settings, **NONE)

    return curve


def ranked(target: float, margin: float) -> Curve:
    def curve(x: Tensor) -> Tensor:
        given = torch.full_like(x, target)
        return F.margin_ranking_loss(x, torch.zeros_like(x), given, margin=margin, **NONE)

    return curve


def gaussian(variance: float) -> Curve:
    return lambda x: F.gaussian_nll_loss(
        x, torch.zeros_like(x), torch.full_like(x, variance), **NONE
    )


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return 1 - torch.nn.functional.cosine_similarity(a, b)


def far_angle(margin: float) -> Curve:
    """Anchor and positive 60 degrees apart, the negative at the abscissa."""

    def curve(x: Tensor) -> Tensor:
        anchor = at_angle(torch.zeros_like(x))
        positive = at_angle(torch.full_like(x, torch.pi / 3))
        given: dict[str, Any] = {"distance_function": _distance, "margin": margin, **NONE}
        return F.triplet_margin_with_distance_loss(anchor, positive, at_angle(x), **given)

    return curve


def multilabel(target: float) -> Curve:
    return lambda x: F.multilabel_soft_margin_loss(
        x[:, None], x.new_full((len(x), 1), target), **NONE
    )


DISTANCE, LOGIT, OWN = "x − t", "x", "x_y"
PLOTS: dict[str, Plot] = {
    "mse_loss": Plot(DISTANCE, -3, 3, {"mse_loss": against("mse_loss", 0)}),
    "l1_loss": Plot(DISTANCE, -3, 3, {"l1_loss": against("l1_loss", 0)}),
    "huber_loss": Plot(
        *(DISTANCE, -3, 3),
        {f"delta={d}": against("huber_loss", 0, delta=d) for d in (0.5, 1.0, 2.0)},
    ),
    "smooth_l1_loss": Plot(
        *(DISTANCE, -3, 3),
        {f"beta={b}": against("smooth_l1_loss", 0, beta=b) for b in (0.0, 1.0, 2.0)},
    ),
    "binary_cross_entropy": Plot(
        *("x", 0, 1),
        {f"t={t}": against("binary_cross_entropy", t) for t in (1, 0.5, 0)},
        slope=(-10, 10),
    ),
    "binary_cross_entropy_with_logits": Plot(
        *(LOGIT, -6, 6),
        {
            "t=1": against("binary_cross_entropy_with_logits", 1),
            "t=0": against("binary_cross_entropy_with_logits", 0),
            "t=1, pos_weight=3": lambda x: F.binary_cross_entropy_with_logits(
                x, torch.ones_like(x), pos_weight=x.new_full((1,), 3.0), **NONE
            ),
        },
    ),
    "sigmoid_focal_loss": Plot(
        *("x  (t = 1)", -6, 6),
        {f"gamma={g}": against("sigmoid_focal_loss", 1, alpha=-1, gamma=g) for g in (0, 1, 2, 5)},
    ),
    "cross_entropy": Plot(
        *(OWN, -6, 8),
        {
            f"label_smoothing={h}": of_class("cross_entropy", 3, label_smoothing=h)
            for h in (0.0, 0.1, 0.3)
        },
    ),
    "softmax_focal_loss": Plot(
        *(OWN, -6, 8),
        {f"gamma={g}": of_class("softmax_focal_loss", 3, gamma=g) for g in (0, 1, 2, 5)},
    ),
    "nll_loss": Plot("log p_y", -5, 0, {"nll_loss": of_class("nll_loss", 3)}),
    "poisson_nll_loss": Plot(
        *("x = log λ", -3, 3),
        {f"t={t}": against("poisson_nll_loss", t) for t in (0, 1, 5)},
    ),
    "gaussian_nll_loss": Plot(
        *(DISTANCE, -4, 4),
        {f"var={v}": gaussian(v) for v in (0.5, 1.0, 4.0)},
        value=(-1, 6),
        slope=(-4, 4),
    ),
    "kl_div": Plot(
        *("x = log q", -5, 0), {f"t={t}": against("kl_div", t) for t in (0.1, 0.5, 1.0)}
    ),
    "soft_margin_loss": Plot(
        *(LOGIT, -5, 5), {f"t={t}": against("soft_margin_loss", t) for t in (1, -1)}
    ),
    "hinge_embedding_loss": Plot(
        *("x", 0, 2.5), {f"t={t}": against("hinge_embedding_loss", t) for t in (1, -1)}
    ),
    "margin_ranking_loss": Plot(
        *("x₁ − x₂", -3, 3),
        {
            "t=1, margin=0": ranked(1, 0.0),
            "t=1, margin=1": ranked(1, 1.0),
            "t=-1, margin=0": ranked(-1, 0.0),
        },
    ),
    "multi_margin_loss": Plot(
        *(OWN, -2, 3), {f"p={p}": of_class("multi_margin_loss", 3, p=p) for p in (1, 2)}
    ),
    "multilabel_margin_loss": Plot(
        *("x₀", -2, 3), {"Y={0}": labelled((0,)), "Y={0, 1}": labelled((0, 1))}
    ),
    "multilabel_soft_margin_loss": Plot(*(LOGIT, -6, 6), {f"t={t}": multilabel(t) for t in (1, 0)}),
    "triplet_margin_loss": Plot(
        *("x⁻  (a = 0, x⁺ = 1)", -4, 4),
        {f"margin={m}": negative_at(F.triplet_margin_loss, margin=m) for m in (0.5, 1.0, 2.0)},
    ),
    "triplet_margin_with_distance_loss": Plot(
        *("∠(a, x⁻)", 0, torch.pi), {f"margin={m}": far_angle(m) for m in (0.2, 0.5, 1.0)}
    ),
    "cosine_embedding_loss": Plot(
        *("∠(a, b)", 0, torch.pi),
        {
            "t=1": cosine(1),
            "t=-1, margin=0": cosine(-1),
            "t=-1, margin=0.5": cosine(-1, 0.5),
        },
    ),
    "ctc_loss": Plot(*("x", -6, 6), {f"T={n}": sequence(n) for n in (1, 2, 4, 8)}),
    "dice_loss": Plot(
        *(OWN, -6, 6),
        {
            "overlap='dice'": overlap("dice_loss"),
            "overlap='jaccard'": overlap("dice_loss", overlap="jaccard"),
            "overlap='tversky', beta=2": overlap("dice_loss", overlap="tversky", beta=2.0),
        },
    ),
    "dice_cross_entropy": Plot(
        *(OWN, -6, 6),
        {f"lambda_ce={c}": overlap("dice_cross_entropy", lambda_ce=c) for c in (0.0, 0.5, 1.0)},
    ),
    "dice_focal": Plot(
        *(OWN, -6, 6),
        {f"lambda_focal={c}": overlap("dice_focal", lambda_focal=c) for c in (0.0, 0.5, 1.0)},
    ),
    "linear_cross_entropy": Plot(
        *(OWN, -6, 10),
        {
            "linear_cross_entropy": head("linear_cross_entropy", **NONE),
            "softcap=4": head("linear_cross_entropy", softcap=4.0, **NONE),
            "z_loss=0.02": head("linear_cross_entropy", z_loss=0.02, **NONE),
        },
    ),
    "AdaptiveLogSoftmaxWithLoss": Plot(
        *(OWN, -6, 6),
        {f"target={2 * rare}": in_clusters(bool(rare)) for rare in (0, 1)},
    ),
    "linear_log_prob": Plot(
        *(OWN, -6, 6),
        {f"temperature={t}": head("linear_log_prob", temperature=t) for t in (0.5, 1.0, 2.0)},
    ),
    "linear_kl_div": Plot(
        *(OWN, -4, 8),
        {f"divergence='{d}'": from_teacher(divergence=d) for d in ("forward", "reverse", "js")},
    ),
}
