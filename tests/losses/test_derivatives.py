"""Derivatives against finite differences, and backward once more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import (
    Case,
    Tensors,
    formula_path,
    leaves,
    parameters_reduced,
    same_bits,
)
from torch import Generator, Tensor

each_path = pytest.mark.parametrize("path", [nullcontext, formula_path], ids=["kernel", "formula"])


@each_path
@parameters_reduced()
def test_finite_differences(
    case: Case, reduction: str, path: Callable[[], Any], generator: Generator
) -> None:
    function, inputs = differentiable(case, reduction, generator)
    with path():
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True
        )


@pytest.mark.one_in(2)
@each_path
@parameters_reduced()
def test_finite_differences_of_the_gradient(
    case: Case, reduction: str, path: Callable[[], Any], generator: Generator
) -> None:
    function, inputs = differentiable(case, reduction, generator)
    with path():
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def differentiable(
    case: Case, reduction: str, generator: Generator
) -> tuple[Callable[..., Tensor], Tensors]:
    tensors, options = case.example((5, 4), torch.float64, generator)
    inputs = leaves(tensors, case.loss.differentiable)[: len(case.loss.differentiable)]
    rest = tensors[len(inputs) :]
    return lambda *x: case.function(*x, *rest, **options, reduction=reduction), inputs


@pytest.mark.parametrize("factor", [1.0, -2.5])
@parameters_reduced()
def test_second_backward(case: Case, reduction: str, factor: float, generator: Generator) -> None:
    """It gives the same bits, whatever was done to the gradients of the first."""
    tensors, options = case.example((5, 7), torch.float32, generator)
    inputs = leaves(tensors, case.loss.differentiable)
    moving = inputs[: len(case.loss.differentiable)]
    value = case.function(*inputs, **options, reduction=reduction)
    incoming = torch.full_like(value, factor)
    first = torch.autograd.grad(value, moving, incoming, retain_graph=True)
    kept = [g.clone() for g in first]
    for retain in (True, False):
        for grad in first:
            grad.fill_(float("nan"))
        first = torch.autograd.grad(value, moving, incoming, retain_graph=retain)
        assert all(map(same_bits, first, kept))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, moving, incoming)
