"""NaN, infinities and what an ignored row holds: where they go, and where not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import (
    Case,
    Options,
    Tensors,
    formula_path,
    parameters,
    parameters_reduced,
    run,
    same_bits,
)
from torch import Generator

from fusedloss.front.definition import REGISTRY

LANES = 64  # positions side by side where classes are strided


@pytest.mark.one_in(2)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")], ids=str)
@parameters_reduced()
def test_specials_go_where_the_formula_lets_them(
    case: Case, reduction: str, special: float, generator: Generator
) -> None:
    for shape in [(3, 37), (2, 5, LANES + 2)] if case.kind == "rows" else [(3, 37)]:
        clean, options = case.example(shape, torch.float32, generator)
        options["reduction"] = reduction
        for k in case.loss.differentiable:
            if case.loss.variant == "probabilities" and k == len(clean) - 1 and special == special:
                continue  # no probability is infinite
            for position in (0, clean[k].numel() // 2, clean[k].numel() - 1):
                tensors = tuple(t.clone() for t in clean)
                tensors[k].view(-1)[position] = special
                compare_paths(case, tensors, options, f"argument {k}[{position}] of {shape}")


def compare_paths(case: Case, tensors: Tensors, options: Options, where: str) -> None:
    wanted = case.loss.differentiable
    refused = None
    if case.loss.name == "binary_cross_entropy":  # it takes nothing beyond [0, 1]
        refused = pytest.raises(RuntimeError, match="between 0 and 1")
    elif case.loss.name == "gaussian_nll_loss" and (tensors[2] < 0).any():
        refused = pytest.raises(ValueError, match="var has negative entry")
    if refused:
        for path in (nullcontext, formula_path):
            with path(), refused:
                run(case.function, tensors, options)
        return
    kernel = run(case.function, tensors, options, wanted)
    with formula_path():
        formula = run(case.function, tensors, options, wanted)
    infinite = any(t.isinf().any() for t in tensors if t.is_floating_point())
    for (name, a), (_, e) in zip(kernel.named(), formula.named(), strict=True):
        if case.kind == "heads" and name != "value" and infinite:
            continue  # 0 * inf in products of more or fewer rows
        if case.kind == "triplet" and name != "value":
            # Where a branch is not taken the kernel has 0, the formula 0 * inf.
            a = torch.where(e.isfinite() & kernel.value.isfinite().all(), a, e)
        if case.kind == "sequences" and name != "value":
            # Where no alignment comes by, the kernel has 0, the formula 0 * NaN, and before it too.
            a = torch.where(e.isnan() & ((a == 0) | kernel.value.isfinite().all()), e, a)
        close = torch.isclose(a, e, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert close.all(), f"{where}: {name} is {a[~close]}, not {e[~close]}"


@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("classes", [3, 20, 300])
def test_what_an_ignored_row_holds_does_not_count(
    loss: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    classes: int,
    generator: Generator,
) -> None:
    row = REGISTRY[loss]
    x = torch.rand(2, classes, 5, 7, generator=generator).to(dtype)
    target = torch.randint(classes, (2, 5, 7), generator=generator)
    ignored = torch.rand(2, 5, 7, generator=generator) < 0.3
    x.masked_fill_(ignored[:, None], float("nan"))
    target[ignored] = -1
    whole = x.to(memory_format=memory_format).requires_grad_()
    row.function(whole, target, ignore_index=-1).backward()
    kept = x.detach().movedim(1, -1)[~ignored].requires_grad_()
    row.function(kept, target[~ignored]).backward()
    assert whole.grad is not None and kept.grad is not None
    grad = whole.grad.movedim(1, -1)
    assert (grad[ignored] == 0).all()
    torch.testing.assert_close(grad[~ignored], kept.grad)


@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
@parameters(lambda case: case.loss.name != "binary_cross_entropy")
def test_specials_stay_in_their_row(case: Case, special: float, generator: Generator) -> None:
    tensors, options = case.example((70, 5), torch.float32, generator)
    options["reduction"] = "none"
    wanted = case.of_rows
    clean = run(case.function, tensors, options, wanted)
    for k in wanted:
        for row in (0, 33, 69):
            planted = tuple(t.clone() for t in tensors)
            planted[k][case.rows_at(k, row)] = special
            dirty = run(case.function, planted, options, wanted)
            places = ((row,), *(case.rows_at(k, row) for k in wanted))
            for (name, a), (_, e), place in zip(dirty.named(), clean.named(), places, strict=True):
                a, e = a.clone(), e.clone()
                a[place] = e[place] = 0
                assert same_bits(a, e), f"{name}: row {row} reached another"
