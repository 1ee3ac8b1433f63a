"""What 'mean' divides by, and what it does to the digits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import (
    FLOATS,
    HALVES,
    Case,
    Options,
    Tensors,
    assert_same_bits,
    formula_path,
    parameters,
    parameters_reduced,
    run,
)
from torch import Generator, Tensor

from fusedloss.front.definition import REGISTRY


@parameters()
def test_sum_and_mean_are_those_of_none(case: Case, generator: Generator) -> None:
    tensors, options = case.example((40, 70), torch.float32, generator)
    losses = case.function(*tensors, **options, reduction="none").double()
    total = case.function(*tensors, **options, reduction="sum")
    torch.testing.assert_close(total.double(), losses.sum(), rtol=1e-6, atol=1e-5)


def mapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def one(*tensors: Tensor, **options: Any) -> Tensor:
        batch = (t.unsqueeze(0) for t in tensors)
        return torch.vmap(lambda *each: function(*each, **options))(*batch)[0]

    return one


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)


DIVIDES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "kernel": (nullcontext, lambda function: function),
    "formula": (formula_path, lambda function: function),
    "vmap": (nullcontext, mapped),
    "compiled": (nullcontext, compiled),
}


def divisor(case: Case, tensors: Tensors, options: Options, losses: Tensor) -> float:
    """Of the mean, from numbers that a computer rounds once."""
    weight = options.get("weight")
    target = options.get("target")
    if case.loss.name == "multi_margin_loss":  # its mean is of the rows
        return losses.numel()
    if case.kind == "pointwise" and "ignore_index" in options:
        return int((tensors[1] != options["ignore_index"]).sum())
    if target is not None or case.loss.indices is not None:
        target = tensors[case.loss.indices] if target is None else target
        kept = target[target != options.get("ignore_index", -100)]
        return len(kept) if weight is None else math.fsum(weight[kept].tolist())
    if case.loss.name in ("mse_loss", "l1_loss") and weight is not None:
        return math.fsum(weight.flatten().tolist())
    return losses.numel()


DEFAULTS = (torch.float32, torch.float64, *HALVES)

# torch.compile's own, of any autograd function.
of_compile = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("path", [name for name in DIVIDES if name != "compiled"])
@parameters(lambda case: "mean" in case.reductions and case.kind != "sequences")  # each has its own
def test_mean_is_the_sum_over_an_exact_divisor(case: Case, path: str, generator: Generator) -> None:
    for shape in filter(case.takes, ((37, 7), (3, 5, 11), (6,))):
        for weights in FLOATS:
            assert_divides(case, path, shape, weights, generator)


@pytest.mark.one_in(4)
@of_compile
@parameters(lambda case: case.option in ("weight", "all") and "mean" in case.reductions)
def test_compiled_mean_is_the_sum_over_an_exact_divisor(case: Case, generator: Generator) -> None:
    assert_divides(case, "compiled", (37, 7), torch.float32, generator)


def assert_divides(
    case: Case, path: str, shape: tuple[int, ...], weights: torch.dtype, generator: Generator
) -> None:
    where, through = DIVIDES[path]
    tensors, options = case.example(shape, torch.float64, generator)
    if case.kind != "heads" and case.loss.indices is None:  # others have the input's type
        options = {k: _typed(v, weights) for k, v in options.items()}
    with where():
        function = through(case.function)
        losses = run(case.function, tensors, {**options, "reduction": "none"}).value
        total, mean = (
            run(function, tensors, {**options, "reduction": r}, case.loss.differentiable)
            for r in ("sum", "mean")
        )
    by = divisor(case, tensors, options, losses)
    for (name, a), (_, e) in zip(mean.named(), total.named(), strict=True):
        error = (a - e / by).abs().max() / (e / by).abs().max()
        assert not error > 1e-14, f"{shape} {weights} {name}: off by {error:.3g}"


def _typed(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


@pytest.mark.one_in(12)
@pytest.mark.parametrize("path", [name for name in DIVIDES if name != "compiled"])
@parameters_reduced()
def test_the_default_type_changes_no_bit(
    case: Case, reduction: str, path: str, generator: Generator
) -> None:
    where, through = DIVIDES[path]
    function = through(case.function)
    shapes = [(9, 7), (6,), ()] if case.kind == "pointwise" else [(9, 7), (6,)]
    for shape, dtype in itertools.product(shapes, FLOATS):
        tensors, options = case.example(shape, dtype, generator)
        options["reduction"] = reduction
        found = []
        for default in DEFAULTS:
            torch.set_default_dtype(default)
            try:
                with where():
                    found.append(run(function, tensors, options, case.loss.differentiable))
            finally:
                torch.set_default_dtype(torch.float32)
        for other in found[1:]:
            assert_same_bits(other, found[0])


@of_compile
@pytest.mark.parametrize("path", DIVIDES)
@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss", "mse_loss"])
def test_weights_whose_sum_passes_the_greatest_half(loss: str, path: str) -> None:
    where, through = DIVIDES[path]
    x = torch.linspace(-1, 1, 400).reshape(100, 4).half()
    if loss == "nll_loss":
        x = x.float().log_softmax(1).half()
    weight = torch.full_like(x if loss == "mse_loss" else x[0], 60000)
    target = x.flip(0) if loss == "mse_loss" else torch.arange(100) % 4
    function = REGISTRY[loss].function
    with where():
        found = run(through(function), (x, target), {"weight": weight}, (0,))
    wide = x.double(), target.double() if loss == "mse_loss" else target
    exact = run(function, wide, {}, (0,))
    for (_, a), (_, e) in zip(found.named(), exact.named(), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-7)
