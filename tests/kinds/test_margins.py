"""Margins of labels, and the cosine of pairs: what the registry's tests do not ask."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from conftest import formula_path
from torch import Generator, Tensor, tensor
from torch.testing import assert_close

import fusedloss
from fusedloss import functional as ours

PATHS = {"kernel": nullcontext, "formula": formula_path}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
INDEX, SETS = "multi_margin_loss", "multilabel_margin_loss"


def outcome(face: Any, name: str, x: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    value = getattr(face, name)(leaf, target, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaf)]


@each_path
@pytest.mark.parametrize("classes", [1, 5, 3000])
def test_label_sets(path: Any, classes: int, generator: Generator) -> None:
    """Repeated, after the end, of all classes, of none."""
    x = torch.randn(5, classes, dtype=torch.float64, generator=generator)
    target = torch.randint(classes, (5, classes), generator=generator)
    target[0, :2] = tensor([0, 0])[:classes]
    target[1:4, min(classes, 9) - 1] = -1
    target[2, 0] = -1
    target[4] = torch.arange(classes)
    for reduction in ("none", "mean", "sum"):
        expected = outcome(theirs, SETS, x, target, reduction=reduction)
        with path():
            assert_close(outcome(ours, SETS, x, target, reduction=reduction), expected)


@each_path
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int16])
@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            INDEX,
            [0, 3, 9, 7],
            r"target\[2\] = 9 is out of range for 4 classes: target out of range",
        ),
        (INDEX, [0, -2, 9, 1], r"target\[1\] = (-2|254) is out of range"),
        (
            SETS,
            [[3, -1, 0, 1], [0, 1, -1, 4], [4, 0, 0, 0]],
            r"target\[1, 3\] = 4 is no class of 4",
        ),
        (SETS, [[3, -1, 0, -7]], r"target\[0, 3\] = (-7|249) is no class of 4, nor the -1"),
    ],
)
def test_labels_out_of_range(
    path: Any, name: str, target: Any, message: str, dtype: torch.dtype
) -> None:
    given = tensor(target)
    if dtype is torch.uint8:  # without ends
        given = torch.where(given == -1, 0, given)
    given = given.to(dtype)
    x = torch.zeros(len(given), 4)
    with pytest.raises(RuntimeError):
        getattr(theirs, name)(x, given.long())
    for reduction in ("none", "mean"):
        with path(), pytest.raises(RuntimeError, match=f"{name}: {message}"):
            getattr(ours, name)(x, given, reduction=reduction)


def test_the_first_of_many_rows_is_told() -> None:
    target = torch.zeros(100_000, dtype=torch.long)
    target[[4001, 90_000, 50_000]] = 3
    with pytest.raises(RuntimeError, match=r"target\[4001\] = 3"):
        ours.multi_margin_loss(torch.zeros(100_000, 3), target)


X, Y = torch.zeros(3, 4), tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("name", "given", "options", "kind", "message"),
    [
        (INDEX, (X, Y), {"p": 3}, ValueError, "p must be 1 or 2, got 3"),
        (INDEX, (X, Y), {"weight": torch.ones(4, 1)}, ValueError, "one-dimensional"),
        (INDEX, (X, Y), {"weight": torch.ones(3)}, RuntimeError, "expected 4 but got"),
        (INDEX, (X, Y), {"weight": torch.ones(4).double()}, RuntimeError, "Float but found Double"),
        (INDEX, (X, Y[:2]), {}, RuntimeError, r"Expected target size \[3\], but got \[2\]"),
        (INDEX, (X, Y.float()), {}, RuntimeError, "Long but found Float"),
        (INDEX, (X.long(), Y), {}, NotImplementedError, "real floating point"),
        (INDEX, (X[None], Y), {}, RuntimeError, "vector or matrix"),
        (INDEX, (X[:, :0], Y), {}, RuntimeError, "vector or matrix"),
        (INDEX, (X, None), {}, TypeError, "'target' must be Tensor"),
        (INDEX, (X, Y), {"margin": None}, TypeError, "'margin' must be float"),
        (SETS, (X, Y), {}, RuntimeError, "inconsistent target size"),
        (SETS, (X, X), {}, RuntimeError, "Long but found Float"),
        (SETS, (X, X.long()), {"reduction": "all"}, ValueError, "all is not a valid value"),
    ],
)
def test_refuses(
    name: str, given: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind):
        getattr(theirs, name)(*given, **options)
    with pytest.raises(kind, match=f"{name}: .*{message}"):
        getattr(ours, name)(*given, **options)


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_cosine_of_zero_vectors(path: Any, dtype: torch.dtype, generator: Generator) -> None:
    """It is 0, and its gradient 10^6 b / |b|: what PyTorch's eps of 10^-12 makes of it."""
    a = torch.zeros(3, 5, dtype=dtype)
    b = torch.randn(3, 5, generator=generator).to(dtype)
    y = tensor([1, -1, 0])
    leaf = a.requires_grad_()
    with path():
        losses = ours.cosine_embedding_loss(leaf, b, y, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.tolist() == [1, 0, 0]
    wide = b.double()
    unit = 1e6 * wide / (wide.square().sum(1, keepdim=True) + 1e-12).sqrt()
    expected = unit * tensor([[-1.0], [1.0], [0.0]])
    assert_close(grad, expected.to(dtype), rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=0)


def test_strict_takes_no_other_target() -> None:
    pairs = torch.ones(3, 2), torch.ones(3, 2)
    for target in (tensor([1, 0, -1]), tensor([1.0, 0.0, -1.0])):
        assert ours.cosine_embedding_loss(*pairs, target).isfinite()
        with (
            fusedloss.checks("strict"),
            pytest.raises(ValueError, match=r"target\[1\] = 0: labels"),
        ):
            ours.cosine_embedding_loss(*pairs, target)


@pytest.mark.parametrize("shape", [(3, 1), (1, 1), (1, 4)])
def test_pairs_that_broadcast(shape: tuple[int, int], generator: Generator) -> None:
    """Of broadcast features each square is of its own tensor's."""
    a = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    b = torch.randn(shape, dtype=torch.float64, generator=generator)
    for y in (tensor([1, -1, 1]), tensor([1])):
        found = []
        for face in (ours, theirs):
            leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
            value = face.cosine_embedding_loss(*leaves, y)
            found.append([value, *torch.autograd.grad(value, leaves)])
        assert_close(*found)
    one = a[:1].clone().requires_grad_()
    many = tensor([1, 1, -1])
    assert_close(
        ours.cosine_embedding_loss(one, b[:1], many), theirs.cosine_embedding_loss(one, b[:1], many)
    )
