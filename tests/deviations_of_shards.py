"""Deviations from PyTorch in what several processes compute of DTensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as theirs
from deviations import deviation
from distributed import ranks
from distributed.matrix import whole
from distributed.uses import ALL, CLASSES, ROWS, P, Q, X, Y, on_mesh, parallel
from torch import Tensor

import fusedloss as ours


def value_and_gradient(function: Any, x: Tensor, *others: Any, **settings: Any) -> tuple[Any, Any]:
    """Those of the whole; the gradient may lack its reduction."""
    x = x.detach().requires_grad_()
    value = function(x, *others, **settings)
    summed = whole(value)
    summed.backward()
    return summed.detach(), whole(x.grad)


def both(function: str, x: Tensor, t: Tensor, place: Any, **settings: Any) -> list[Any]:
    """Of one process, of PyTorch's DTensors and of ours."""
    name = getattr(theirs, function)
    placed = on_mesh(x, place), on_mesh(t, ALL if t.dim() < 2 and place == CLASSES else place)
    return [
        value_and_gradient(name, x, t, **settings),
        value_and_gradient(name, *placed, **settings),
        value_and_gradient(getattr(ours, function), *placed, **settings),
    ]


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, equal_nan=True)


def of_elements(_: int) -> None:
    for function in ("mse_loss", "binary_cross_entropy"):
        one, torchs, own = both(function, P[:4], Q[:4], ROWS)
        assert near(torchs[0], one[0]) and near(torchs[1], 2 * one[1])
        assert near(own[0], one[0]) and near(own[1], one[1])
        one, torchs, own = both(function, P, Q, ROWS)
        assert not near(torchs[0], one[0])
        assert near(own[0], one[0]) and near(own[1], one[1])


def of_rows(_: int) -> None:
    for y in (torch.tensor([0, -100, 2, 3]), torch.tensor([0, 5, -100, -100])):
        for function, x in (("cross_entropy", X[:4]), ("nll_loss", X[:4].log_softmax(1))):
            one, torchs, own = both(function, x, y, ROWS)
            assert not near(torchs[0], one[0])
            assert near(own[0], one[0]) and near(own[1], one[1])


def in_loss_parallel(_: int) -> None:
    with parallel():
        for function, x, t in (
            ("cross_entropy", X, X.flip(0).softmax(1)),
            ("nll_loss", X.log_softmax(1), Y),
        ):
            name = getattr(theirs, function)
            one = value_and_gradient(name, x, t)
            placed = on_mesh(x, CLASSES), on_mesh(t, CLASSES if t.dim() > 1 else ALL)
            torchs = value_and_gradient(name, *placed)
            own = value_and_gradient(getattr(ours, function), *placed)
            assert near(torchs[0], one[0]) and not near(torchs[1], one[1])
            assert near(own[0], one[0]) and near(own[1], one[1])
        bad = torch.tensor([0, 7, 99, -3, 1])
        assert theirs.cross_entropy(on_mesh(X, CLASSES), bad).full_tensor().isfinite()
        try:
            ours.cross_entropy(on_mesh(X, CLASSES), bad)
        except IndexError as error:
            assert "target[1] = 7" in str(error)
        else:
            raise AssertionError("not refused")


def of_items(rank: int) -> list[float]:
    placed = on_mesh(X[:4], ROWS), on_mesh(Y[:4], ROWS)
    return [library.cross_entropy(*placed).item() for library in (theirs, ours)]


@deviation
def _() -> None:
    """`mse_loss` and `binary_cross_entropy` of sharded DTensors: a mean and its gradient are those of one
    process"""
    ranks.run(2, of_elements)


@deviation
def _() -> None:
    """`cross_entropy` and `nll_loss` of DTensors sharded by rows: a mean is over all rows that count"""
    ranks.run(2, of_rows)


@deviation
def _() -> None:
    """Inside `loss_parallel()`: `nll_loss` and class probabilities have the gradients of one process, and a
    class index out of range is refused"""
    ranks.run(2, in_loss_parallel)


@deviation
def _() -> None:
    """A reduced loss of DTensors is held by every process alike: `.item()` is the loss"""
    (first, own), (second, others) = ranks.run(2, of_items)
    assert first != second
    assert own == others
