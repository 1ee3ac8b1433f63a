"""The same bits, whatever the threads and the batch; halves are rounded once."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    HALVES,
    Case,
    Options,
    Outcome,
    Tensors,
    assert_same_bits,
    each_dtype,
    name_of,
    no_head,
    parameters,
    run,
    same_bits,
)
from torch import Generator, Tensor

import fusedloss

THREADED = 70_000  # elements: twice the grain of any kernel


# Matrix products may be other ones where there are more threads or rows.
@pytest.mark.parametrize("reduction", ["none", "mean"])
@parameters(no_head)
def test_threads_do_not_change_a_bit(case: Case, reduction: str, generator: Generator) -> None:
    shapes = [(37, THREADED // 37)]
    if case.kind == "rows":
        shapes.append((2, 7, THREADED // 14))
    for shape in shapes:
        tensors, options = case.example(shape, torch.float32, generator)
        options["reduction"] = reduction
        one = run(case.function, tensors, options, case.loss.differentiable)
        torch.set_num_threads(2)
        try:
            two = run(case.function, tensors, options, case.loss.differentiable)
        finally:
            torch.set_num_threads(1)
        assert_same_bits(two, one)
        again = run(case.function, tensors, options, case.loss.differentiable)
        assert_same_bits(again, one)


@each_dtype
@parameters(lambda case: not case.loss.whole)
def test_a_row_does_not_depend_on_its_batch(
    case: Case, dtype: torch.dtype, generator: Generator
) -> None:
    shapes = [(67, 13), (67, 1030)]
    if case.kind == "rows":
        shapes.append((67, 5, 3))
    for shape in shapes:
        tensors, settings = case.example(shape, dtype, generator)
        whole = rows_of(case, tensors, settings, slice(None))
        for rows in (slice(0, 1), slice(33, 34), slice(66, 67), slice(5, 44), slice(1, None, 3)):
            part = rows_of(case, tensors, settings, rows)
            assert_same_bits(part, some_of(case, whole, rows))


def some_of(case: Case, whole: Outcome, rows: slice) -> Outcome:
    wanted = zip(case.loss.differentiable, whole.grads, strict=True)
    return Outcome(whole.value[rows], tuple(g[case.rows_at(k, rows)] for k, g in wanted))


def rows_of(case: Case, tensors: Tensors, settings: Options, rows: slice) -> Outcome:
    if "sample_weight" in settings and case.kind == "pointwise":
        settings = {**settings, "sample_weight": settings["sample_weight"][rows]}
    options = {
        k: v[rows] if isinstance(v, Tensor) and v.shape == tensors[0].shape else v
        for k, v in settings.items()
    }
    options["reduction"] = "none"
    return run(
        case.function,
        tuple(t[case.rows_at(k, rows)] for k, t in enumerate(tensors)),
        options,
        case.loss.differentiable,
    )


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_ties_round_to_even(dtype: torch.dtype) -> None:
    """Odd squares end in 001, three times them in 011: ties of the first go down, of the second up."""
    x = torch.arange(256).to(dtype)
    for factor in (1, 3):
        weight = torch.full_like(x, factor)
        found = fusedloss.mse_loss(x, torch.zeros_like(x), reduction="none", weight=weight)
        assert same_bits(found, (factor * x.float().square()).to(dtype))
        sums = [
            fusedloss.mse_loss(v, torch.zeros_like(v), reduction="sum", weight=w)
            for v, w in zip(x, weight, strict=True)
        ]
        assert same_bits(torch.stack(sums), found)


@pytest.mark.parametrize("step", [1, 2], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_every_half_is_read_and_rounded_as_torch_does(dtype: torch.dtype, step: int) -> None:
    """Subnormals, infinities and NaNs among them."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.repeat_interleave(step)[::step]
    for factor in (1.0, 1e-3, 3e4):
        weight = torch.full((2**16,), factor)
        found = fusedloss.mse_loss(
            x, torch.zeros_like(x), reduction="none", weight=weight.to(dtype)
        )
        want = x.float().square() * weight.to(dtype).float()
        assert same_bits(found, want.to(dtype))
