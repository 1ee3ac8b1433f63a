"""What `fusedloss demo` leaves behind: all numbers as JSON, and a panel for each loss."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

import fusedloss

from .training import Result

LIGHT, DARK, RED, GREY = "#9ecae1", "#08306b", "#cb181d", "#555555"
FLOOR = 1e-9


def report(results: Sequence[Result], seed: int, quick: bool) -> dict[str, Any]:
    """All numbers, for the JSON file."""
    return {
        "versions": {
            "fusedloss": fusedloss.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "seed": seed,
        "quick": quick,
        "tasks": [
            {
                "loss": result.task.loss,
                "task": result.task.title,
                "metric": result.task.metric,
                "steps": len(result.torch),
                "held_out": {
                    "untrained": result.before,
                    "torch": result.scores[0],
                    "fusedloss": result.scores[1],
                },
                "median_microseconds_in_loss": {
                    "torch": result.microseconds[0],
                    "fusedloss": result.microseconds[1],
                },
                "greatest_relative_error": {
                    "torch": finite(result.torch_error.max()),
                    "fusedloss": finite(result.fusedloss_error.max()),
                },
                "greatest_difference": finite(result.difference.max()),
                "parts_at_step": result.parts,
                "wrong_at_step": result.wrong,
                "curves": {
                    "torch": [finite(loss) for loss in result.torch],
                    "fusedloss": [finite(loss) for loss in result.fusedloss],
                    "torch_float64": [finite(loss) for loss in result.float64],
                    "bound": [finite(bound) for bound in result.bound],
                },
            }
            for result in results
        ],
    }


def finite(value: float) -> float | None:
    """The value as JSON can hold it."""
    return float(value) if np.isfinite(value) else None


def plot(results: Sequence[Result], path: Path) -> None:
    """A panel per loss: both curves, and below them how far they are apart."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(0.6 + 3.7 * columns, 1.0 + 3.4 * rows))
    figure.set_layout_engine("constrained", wspace=0.03, h_pad=0.06)
    panels = figure.add_gridspec(rows, columns)
    for index, result in enumerate(results):
        cell = panels[index // columns, index % columns].subgridspec(2, 1, height_ratios=(3, 1))
        axes_of_cell: Any = cell.subplots(sharex=True)
        curves, apart = axes_of_cell
        for axes in (curves, apart):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8, color=GREY, labelcolor=GREY)
            axes.margins(x=0.01)
        steps = np.arange(1, len(result.torch) + 1)
        curves.plot(steps, result.torch, color=LIGHT, lw=5, solid_capstyle="round")
        curves.plot(steps, result.fusedloss, color=DARK, lw=1, ls=(0, (4, 2)))
        curves.set_ylim(bottom=min(0.0, np.nanmin(result.torch)))
        curves.set_title(result.task.loss, fontsize=11, fontweight="bold", loc="left", pad=16)
        theirs, ours = result.scores
        curves.text(
            *(0, 1.03, f"{result.task.title}: {result.task.metric} {theirs:.3f} and {ours:.3f}"),
            transform=curves.transAxes,
            fontsize=8.5,
            color=GREY,
        )
        apart.fill_between(steps, FLOOR, np.maximum(result.difference, FLOOR), color=DARK, lw=0)
        apart.plot(steps, result.bound, color=RED, lw=1.2)
        apart.set_yscale("log")
        apart.set_ylim(FLOOR, 3 * np.nanmax([*result.bound, *result.difference]))
        if index % columns == 0:
            curves.set_ylabel("loss", fontsize=9)
            apart.set_ylabel("apart", fontsize=9)
        apart.set_xlabel("step", fontsize=9)
    figure.legend(
        handles=[
            Line2D([], [], color=LIGHT, lw=5, label="torch.nn"),
            Line2D([], [], color=DARK, lw=1.2, ls=(0, (4, 2)), label="fusedloss.nn"),
            Patch(color=DARK, label="how far apart"),
            Line2D([], [], color=RED, lw=1.2, label="what float32 rounding explains"),
        ],
        loc="outside upper center",
        ncols=min(4, 2 * columns),
        frameon=False,
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
