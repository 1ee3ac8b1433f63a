"""Cross entropy and negative log likelihood through Triton; the sums are those of the CPU."""

from __future__ import annotations

from . import cross_entropy, nll
from .engine import GpuEngine
from .grid import Grid


class RowsEngine(GpuEngine[Grid]):
    plan = Grid

    def launch(self, plan: Grid) -> None:
        if plan.call.loss == "nll_loss":
            nll.run(plan)
            return
        divisor = cross_entropy.run(plan)
        if plan.incoming is None:
            plan.grads.append(divisor)
