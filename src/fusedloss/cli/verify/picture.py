"""The picture of docs/accuracy.md: errors against the logit, ours and PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from ...front.definition import REGISTRY
from . import exact, measured
from .probes import Probe

LOGITS = torch.linspace(-30, 60, 361)
ONES = torch.ones(len(LOGITS))
LEAST = 2**-5  # ulp: where nothing, or next to nothing, is drawn


def _rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the target's class beside three of 0."""
    return torch.stack([logits, *[torch.zeros_like(logits)] * 3], 1), torch.zeros(
        len(logits)
    ).long()


PANELS: Sequence[tuple[str, str, tuple[Tensor, ...], int]] = (
    ("cross_entropy: loss", "cross_entropy", _rows(LOGITS), 0),
    ("cross_entropy: gradient by the logit", "cross_entropy", _rows(LOGITS), 1),
    (
        "BCE with logits, target 1: gradient",
        "binary_cross_entropy_with_logits",
        (LOGITS, ONES),
        1,
    ),
)


def draw(file: Path) -> None:
    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "fusedloss", "font.size": 9}
    figure, axes = pyplot.subplots(
        1, len(PANELS), figsize=(11, 3.2), sharey=True, layout="constrained"
    )
    for axis, (title, key, tensors, quantity) in zip(axes, PANELS, strict=True):
        for path, colour in ((measured.PYTORCH, "#c44"), (measured.paths(False)[0], "#27a")):
            name = "PyTorch" if path is measured.PYTORCH else "fusedloss"
            found = errors(key, tensors, quantity, path).clamp_min(LEAST)
            axis.plot(LOGITS, found, ".", markersize=2.5, color=colour, label=name)
        axis.set(title=title, xlabel="logit of the target's class", yscale="log")
        axis.axhline(2, color="#888", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("error, ulp")
    axes[0].legend(loc="upper left", markerscale=4)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)
    pyplot.close(figure)


def errors(key: str, tensors: tuple[Tensor, ...], quantity: int, path: measured.Path) -> Tensor:
    """Of the value, or of the gradient by the target's logit."""
    probe = Probe(key, "plain", "picture", tensors)
    call = measured.captured(probe)
    assert call is not None
    want = exact.reference(*call)[quantity]
    (_, results), *_ = measured.answer(probe, path)
    result = results[quantity]
    assert result is not None and REGISTRY[key].differentiable[0] == 0
    found, _ = measured.errors(result, want, 2.0, torch.float32)
    return found[:, 0] if found.dim() > 1 else found
