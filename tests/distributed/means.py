"""Means over rows that do not all count, wherever those are; test_uses.py runs these."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from distributed.uses import ALL, ROWS, Checks, V, W, X, Y, drawn, same
from fusedloss import functional as F  # noqa: N812

# By name: the rows that do not count, of 5. Of two processes the first has three.
IGNORED = {
    "some": (1,),
    "those of the first": (0, 1, 2),
    "those of the last": (3, 4),
    "all": (0, 1, 2, 3, 4),
}


def labels(which: tuple[int, ...], ignored: int = -100) -> torch.Tensor:
    y = Y.clone()
    y[list(which)] = ignored
    return y


def bce(x: Any, t: Any, **settings: Any) -> Any:
    return F.binary_cross_entropy_with_logits(x, t, ignore_index=-100, **settings)


def weighted(x: Any, t: Any, weight: Any, **settings: Any) -> Any:
    return F.mse_loss(x, t, weight=weight, **settings)


def checks() -> Checks:
    found: Checks = {}

    def add(name: str, function: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
        for reduction in ("mean", "sum", "none"):
            found[f"{name}, {reduction}"] = functools.partial(
                same, function, *arguments, reduction=reduction, **settings
            )

    for name, which in IGNORED.items():
        y = labels(which)
        for function in (F.cross_entropy, F.nll_loss, F.softmax_focal_loss):
            add(f"{function.__name__}, {name}", function, (X, y), (ROWS, ROWS))
            for weight in (None, ALL):
                words = f"{function.__name__}, weight {weight}, {name}"
                add(words, function, (X, y, W), (ROWS, ROWS, weight))
        add(f"smoothing, {name}", F.cross_entropy, (X, y), (ROWS, ROWS), label_smoothing=0.2)
        images = torch.where(y == -100, -100, 1).unsqueeze(1).expand(5, 3).contiguous()
        add(f"images, {name}", F.cross_entropy, (drawn(5, 7, 3), images), (ROWS, ROWS))
        add(f"head, {name}", F.linear_cross_entropy, (X, V, y), (ROWS, ALL, ROWS), (0, 1))
        add(f"head of classes, {name}", F.linear_cross_entropy, (X, V, y), (ALL, ROWS, ALL), (0, 1))
        counted = torch.where((y == -100).unsqueeze(1), -100.0, (X > 0).double())
        add(f"elements, {name}", bce, (X, counted), (ROWS, ROWS))
    soft = (X, X.flip(0).softmax(1))
    add("probabilities", F.cross_entropy, soft, (ROWS, ROWS), (0, 1))
    for weight in (ROWS, ALL):
        placements = (ROWS, ROWS, weight)
        add(f"over the weights, {weight}", weighted, (X, X.flip(0), X * X), placements, (0, 1))
    return found
