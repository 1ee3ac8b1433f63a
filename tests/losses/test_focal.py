"""The focal loss: its digits where classes are near certain, and what it is at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_digits import LAYOUTS, PATHS, assert_digits, each_dtype, each_path, wide
from torch import Generator, Tensor

import fusedloss
from fusedloss import softmax_focal_loss


def certain(classes: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Nine rows whose class 0 is ahead of the others, by more and more."""
    x = torch.rand(9, classes, generator=generator, dtype=torch.float64)
    x[:, 0] = torch.linspace(1, 20, 9)
    return x.to(dtype)


def exact(x: Tensor, b: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient from the weights b of the classes; class 0 is the largest."""
    e = np.exp(wide(x) - wide(x[:, :1]))
    e[:, 0] = 1
    others = e[:, 1:].sum(1, keepdims=True)
    total = 1 + others
    p, rest = e / total, (total - e) / total
    rest[:, :1] = others / total
    surprise = np.log1p(others) - (wide(x) - wide(x[:, :1]))
    part = b * rest**gamma * (1 + gamma * p * surprise / rest)
    left = part.sum(1, keepdims=True) - part
    left[:, :1] = part[:, 1:].sum(1, keepdims=True)
    return (b * rest**gamma * surprise).sum(1), p * left - rest * part


@each_dtype
@each_path
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 70, 300])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.5])
def test_near_certainty(
    gamma: float, classes: int, layout: str, path: str, dtype: torch.dtype, generator: Generator
) -> None:
    x = certain(classes, dtype, generator)
    value, slope = exact(x, np.eye(classes, dtype=np.longdouble)[[0] * 9], gamma)
    y = torch.zeros(9, dtype=torch.long)
    with PATHS[path]():
        leaf = LAYOUTS[layout](x).detach().requires_grad_()
        losses = softmax_focal_loss(leaf, y, gamma=gamma, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    few = 16 if path == "kernel" else 64 + 4 * classes
    assert_digits(losses, value, few)
    assert_digits(grad, slope, few)


@each_dtype
def test_smoothing_where_another_class_is_certain(dtype: torch.dtype, generator: Generator) -> None:
    """Only that class counts: its weight is all that smoothing spreads."""
    x = certain(40, dtype, generator)
    weight = torch.cat([torch.ones(1), torch.zeros(39)]).to(dtype)
    b = np.zeros((9, 40), dtype=np.longdouble)
    b[:, 0] = np.longdouble(1) / 40
    value, slope = exact(x, b, 2.0)
    x.requires_grad_()
    y = torch.arange(1, 10)
    losses = softmax_focal_loss(x, y, weight, label_smoothing=1.0, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert_digits(losses, value)
    assert_digits(grad, slope)


def test_without_gamma_it_is_cross_entropy(generator: Generator) -> None:
    x = torch.randn(9, 5, generator=generator, requires_grad=True)
    y = torch.randint(5, (9,), generator=generator)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(5, generator=generator)}):
        losses = [
            f(x, y, **options)
            for f in (
                fusedloss.cross_entropy,
                lambda *t, **o: softmax_focal_loss(*t, gamma=0, **o),
            )
        ]
        grads = [torch.autograd.grad(v, x)[0] for v in losses]
        assert torch.equal(*losses) and torch.equal(*grads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_at_the_edges(path: str, gamma: float) -> None:
    """A class of probability 1 has no loss and no slope; one of probability 0 those of cross entropy."""
    x = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0], [300.0, 0.0]], requires_grad=True)
    y = torch.zeros(3, dtype=torch.long)
    with PATHS[path]():
        losses = softmax_focal_loss(x, y, gamma=gamma, reduction="none")
        (grad,) = torch.autograd.grad(losses[0] + losses[2], x)
    assert losses.tolist() == [0.0, math.inf, 0.0]
    assert grad.tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_gamma_out_of_range(value: float) -> None:
    with pytest.raises(
        ValueError, match=r"softmax_focal_loss: gamma must be finite and at least 0"
    ):
        softmax_focal_loss(torch.zeros(2, 3), torch.tensor([0, 1]), gamma=value)
