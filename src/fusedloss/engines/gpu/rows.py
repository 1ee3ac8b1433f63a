"""Cross entropy and negative log likelihood through Triton; the sums are those of the CPU."""

from __future__ import annotations

from . import cross_entropy, focal_parts, nll
from .engine import GpuEngine
from .grid import Grid


class RowsEngine(GpuEngine[Grid]):
    plan = Grid

    def launch(self, plan: Grid) -> None:
        if plan.call.loss == "nll_loss":
            nll.run(plan)
            return
        call = plan.call
        if call.gamma and call.smoothing:
            divisor = cross_entropy.run(plan, focal_parts.focal_rows, 4)
        else:
            held = 2 if call.probabilities or call.smoothing else 1
            divisor = cross_entropy.run(plan, cross_entropy.softmax_rows, held)
        if plan.incoming is None:
            plan.grads.append(divisor)
