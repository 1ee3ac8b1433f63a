"""What rounding a head's logits to bfloat16 does to its gradients, on a CPU that multiplies bfloat16 itself.

    python benchmarks/rounded_logits.py

For each size of logits, the errors of the gradients by input and weight, in thousandths of the norms of the
true ones (float64 of the same tensors): PyTorch's, ours with all logits rounded, all exact, and by the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fusedloss import linear_cross_entropy
from fusedloss.engines.chunks import loop, products, straight
from fusedloss.route import memo

ROWS, FEATURES, CLASSES = 512, 256, 8000
SIZES = (0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 16.0)

Loss = Callable[..., Tensor]


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.t(), target)


def exact(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, target, exact_logits=True)


def rounded(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    with mock.patch.object(loop, "ORDINARY", 1e30), mock.patch.object(straight, "ORDINARY", 1e30):
        return linear_cross_entropy(x, weight, target)


def gradients(loss: Loss, x: Tensor, weight: Tensor, target: Tensor) -> Sequence[Tensor]:
    memo.known.clear()
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(loss(*leaves, target), leaves)


def main() -> None:
    if not products.multiplies_bfloat16():
        raise SystemExit("this CPU has no instructions for bfloat16: no logits are rounded")
    generator = torch.Generator().manual_seed(0)
    print(
        "| standard deviation | largest of a row, median | PyTorch | rounded | exact | by the rule |"
    )
    print("|--:|--:|--:|--:|--:|--:|")
    for size in SIZES:
        x = torch.randn(ROWS, FEATURES, generator=generator).bfloat16()
        weight = (
            size * torch.randn(CLASSES, FEATURES, generator=generator) / FEATURES**0.5
        ).bfloat16()
        logits = x.float() @ weight.float().t()
        target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        true = gradients(eager, x.double(), weight.double(), target)
        cells = [f"{size:g}", f"{logits.amax(1).median():.1f}"]
        for loss in (eager, rounded, exact, linear_cross_entropy):
            pairs = zip(gradients(loss, x, weight, target), true, strict=True)
            errors = [((g.double() - t).norm() / t.norm()).item() for g, t in pairs]
            cells.append(", ".join(f"{1e3 * e:.2f}" for e in errors))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
