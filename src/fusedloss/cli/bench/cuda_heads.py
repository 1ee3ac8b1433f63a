"""`fusedloss bench --device cuda --linear`: heads whose logits never exist, on a GPU, beside their peers."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import fusedloss

from . import cuda as gpu
from .cuda import Step
from .harness import difference
from .heads import MEBI, Case

FOREVER = float("inf")
ROUNDS = 5
CASES = (
    Case("table", 8192, 4096, 128256, "bfloat16"),
    Case("table", 8192, 2304, 256000, "bfloat16"),
    Case("table", 16384, 2048, 32000, "bfloat16"),
    Case("table", 4096, 2048, 50257, "float32"),
)


@dataclass
class Measured:
    case: Case
    samples: dict[str, list[float]] = field(default_factory=dict)  # seconds, forward and backward
    beyond: dict[str, int] = field(default_factory=dict)  # bytes beyond inputs and gradients
    differences: dict[str, float] = field(default_factory=dict)  # from eager, of the largest entry
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.case.title,
            "seconds": {k: statistics.median(v) for k, v in self.samples.items()},
            "samples": self.samples,
            "beyond_bytes": self.beyond,
            "differences": self.differences,
            "skipped": self.skipped,
        }

    def line(self) -> str:
        parts = [
            f"{k} {1e3 * statistics.median(v):.2f} ms {self.beyond[k] / MEBI:.0f} MiB"
            for k, v in self.samples.items()
        ]
        return ", ".join([self.case.title, *parts, *(f"no {k}" for k in self.skipped)])


class Work:
    """The tensors of a case on the device, and its variants as losses of input, weight and target."""

    def __init__(self, case: Case, device: str) -> None:
        dtype = getattr(torch, case.dtype)
        generator = torch.Generator(device).manual_seed(0)
        draw: dict[str, Any] = {"generator": generator, "device": device}
        self.x = torch.randn(case.n, case.d, **draw).to(dtype).requires_grad_()
        weight = torch.randn(case.v, case.d, **draw).div_(case.d**0.5)
        self.weight = weight.to(dtype).requires_grad_()
        self.target = torch.randint(case.v, (case.n,), **draw)
        self.leaves = [self.x, self.weight]

    def losses(
        self, budgets: tuple[int, ...] = ()
    ) -> Iterator[tuple[str, Callable[[], Callable[..., Tensor]]]]:
        yield "ours", lambda: fusedloss.linear_cross_entropy
        for budget in budgets:

            def within(x: Tensor, w: Tensor, y: Tensor, budget: int = budget) -> Tensor:
                return fusedloss.linear_cross_entropy(x, w, y, memory_budget=budget)

            yield f"ours, {budget // MEBI} MiB", lambda within=within: within  # type: ignore[misc]
        yield "eager", lambda: lambda x, w, y: F.cross_entropy(F.linear(x, w), y)
        yield "liger", liger
        yield "cut-cross-entropy", cut_cross_entropy

    def differentiate(self, loss: Callable[..., Tensor]) -> Step:
        def step() -> None:
            loss(self.x, self.weight, self.target).backward()
            for leaf in self.leaves:
                leaf.grad = None

        return step

    def outcome(self, loss: Callable[..., Tensor]) -> list[Tensor]:
        value = loss(self.x, self.weight, self.target)
        return [value.detach(), *torch.autograd.grad(value, self.leaves)]

    @torch.no_grad()
    def products(self) -> None:
        """What no way around is known: logits, and the gradients of input and weight."""
        logits = torch.mm(self.x, self.weight.t())
        torch.mm(logits, self.weight)
        torch.mm(logits.t(), self.x)


def liger() -> Callable[..., Tensor]:
    criterion = importlib.import_module(
        "liger_kernel.transformers"
    ).LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, y: criterion(w, x, y)


def cut_cross_entropy() -> Callable[..., Tensor]:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x, w, y: function(x, w, y)


def measure(
    case: Case, device: str, budgets: tuple[int, ...] = (), rounds: int = ROUNDS
) -> Measured:
    work, result = Work(case, device), Measured(case)
    steps: dict[str, Step] = {"products": work.products}
    expected = None
    for name, make in sorted(work.losses(budgets), key=lambda pair: pair[0] != "eager"):
        try:
            loss = make()
            outcome = work.outcome(loss)
            if name == "eager":
                expected = outcome
            elif expected is not None:
                pairs = zip(outcome, expected, strict=True)
                result.differences[name] = max(difference(a, b) for a, b in pairs)
            del outcome
            steps[name] = work.differentiate(loss)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            result.skipped[name] = f"{type(error).__name__}: {lines[0]}"[:300]
    del expected
    for name, step in steps.items():
        step()
        gpu.settle(device)
        result.beyond[name] = gpu.beyond(step, work.leaves, device)
    result.samples = gpu.interleaved(steps, device, rounds)
    return result


def benchmark(
    keep: Callable[[list[dict[str, Any]]], None],
    left: Callable[[], float],
    dry: bool = False,
    budgets: tuple[int, ...] = (),
    cases: tuple[Case, ...] = CASES,
) -> list[dict[str, Any]]:
    """Measures while there is time `left`, and gives `keep` what there is after each case."""
    device = "cpu" if dry else "cuda"
    results: list[dict[str, Any]] = []
    for case in cases:
        if left() <= 0:
            break
        try:
            found = measure(replace(case, n=9, d=16, v=40) if dry else case, device, budgets)
        except Exception as error:
            results.append(
                {"title": case.title, "failed": f"{type(error).__name__}: {error}"[:500]}
            )
        else:
            results.append({**found.to_json(), "title": case.title})
            print(found.line(), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        keep(results)
    return results


def run(output: Path) -> int:
    """What `fusedloss bench --device cuda --linear` does: 0, 1 where a case failed, 2 without a GPU."""
    if gpu.absent():
        return 2
    about = {"format": 1, "kind": "gpu linear", "machine": gpu.machine("cuda")}
    results = benchmark(lambda r: gpu.write(output, {**about, "linear": r}), lambda: FOREVER)
    print(f"Wrote {output}; memory is what is beyond inputs and gradients.")
    return int(any("failed" in r or "ours" in r["skipped"] for r in results))
