"""The focal loss of labels, and what it and binary cross entropy leave out, smooth and weigh."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import formula_path, run, same_bits
from torch import Generator, Tensor

import fusedloss
from fusedloss.losses import composed

NAN, INF = float("nan"), float("inf")
LOSSES = (fusedloss.binary_cross_entropy_with_logits, fusedloss.sigmoid_focal_loss)
each_loss = pytest.mark.parametrize("loss", LOSSES)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_the_gradient_by_the_target_is_that_of_the_formula(
    gamma: float, alpha: float, generator: Generator
) -> None:
    x = 3 * torch.randn(4, 5, dtype=torch.float64, generator=generator)
    t = torch.rand(4, 5, dtype=torch.float64, generator=generator)
    options: dict[str, Any] = {"gamma": gamma, "alpha": alpha, "label_smoothing": 0.1}
    ours = run(fusedloss.sigmoid_focal_loss, (x, t), options, (0, 1))
    theirs = run(composed.sigmoid_focal_loss, (x, t), options, (0, 1))
    for a, e in zip((ours.value, *ours.grads), (theirs.value, *theirs.grads), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.7])
def test_nothing_is_lost_where_a_label_is_certain(gamma: float, dtype: torch.dtype) -> None:
    """(1 - p)^gamma of p near 1, which torchvision takes of what rounding left of 1 - p."""
    x = torch.tensor([8.0, 18.0, 30.0, -8.0, -18.0, -30.0], dtype=dtype)
    t = (x > 0).to(dtype)
    options = {"gamma": gamma, "alpha": -1.0, "reduction": "none"}
    q = torch.sigmoid(-x.double().abs())
    value = -torch.log1p(-q) * q**gamma
    slope = -(q**gamma) * (gamma * -torch.log1p(-q) * (1 - q) + q) * x.sign()
    found = run(fusedloss.sigmoid_focal_loss, (x, t), options, (0,))
    within = 2e-6 if dtype is torch.float32 else 1e-13
    least = torch.finfo(dtype).tiny
    torch.testing.assert_close(found.value.double(), value, rtol=within, atol=least)
    torch.testing.assert_close(found.grads[0].double(), slope.double(), rtol=within, atol=least)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_infinite_logits(gamma: float) -> None:
    x, t = torch.tensor([INF, -INF, INF, -INF]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    options = {"gamma": gamma, "alpha": -1.0, "reduction": "none"}
    found = run(fusedloss.sigmoid_focal_loss, (x, t), options, (0,))
    assert found.value.tolist() == [0, 0, INF, INF]
    assert found.grads[0].tolist() == [0, 0, 1, -1]


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_ignored_does_not_count(
    loss: Any, dtype: torch.dtype, generator: Generator
) -> None:
    x = torch.randn(5, 700, generator=generator).to(dtype)
    t = torch.randint(2, x.shape, generator=generator).to(dtype)
    ignored = torch.rand(x.shape, generator=generator) < 0.3
    t[ignored], x[ignored] = 255, NAN
    for reduction in ("mean", "sum"):
        options = {"reduction": reduction, "ignore_index": 255}
        found = run(loss, (x, t), options, (0,))
        kept = run(loss, (x[~ignored], t[~ignored]), {"reduction": reduction}, (0,))
        torch.testing.assert_close(found.value, kept.value)
        assert (found.grads[0][ignored] == 0).all()
        assert same_bits(found.grads[0][~ignored], kept.grads[0])
        with formula_path():
            formula = run(loss, (x, t), options, (0,))
        torch.testing.assert_close(formula.value, found.value)
    assert loss(x, torch.full_like(t, 255), ignore_index=255, reduction="mean").isnan()


@each_loss
def test_second_derivatives_of_what_is_ignored_are_0(loss: Any) -> None:
    x = torch.tensor([NAN, 1.0], requires_grad=True)
    value = loss(x, torch.tensor([-100.0, 1.0]), ignore_index=-100, reduction="sum")
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second[0] == 0 and second[1] != 0


@each_loss
def test_weights_of_the_batch(loss: Any, generator: Generator) -> None:
    x, t = torch.randn(3, 4, 5, generator=generator), torch.rand(3, 4, 5, generator=generator)
    for shape in ((3,), (3, 4), (3, 1, 5), (1,), ()):
        weight = torch.rand(shape, generator=generator)
        spread = weight.reshape(*shape, *(1,) * (3 - len(shape)))
        for reduction in ("none", "mean", "sum"):
            found = loss(x, t, sample_weight=weight, reduction=reduction)
            losses = loss(x, t, reduction="none") * spread
            torch.testing.assert_close(
                found, losses if reduction == "none" else getattr(losses, reduction)()
            )
    learned = torch.ones(3, requires_grad=True)
    loss(x, t, sample_weight=learned, reduction="sum").backward()
    assert learned.grad is not None
    torch.testing.assert_close(learned.grad, loss(x, t, reduction="none").sum((1, 2)))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sample_weight": torch.ones(4)}, RuntimeError, r"sample_weight of shape \[4\] does not"),
        ({"sample_weight": torch.ones(3, 4, 1)}, RuntimeError, "sample_weight of shape"),
        ({"sample_weight": [1.0, 2.0, 3.0]}, TypeError, "'sample_weight' must be Tensor"),
        ({"ignore_index": 1.5}, TypeError, "'ignore_index' must be int"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0.0 and 1.0"),
        ({"label_smoothing": NAN}, ValueError, "label_smoothing must be between"),
    ],
)
@each_loss
def test_bad_options(loss: Any, options: Any, kind: type[Exception], message: str) -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(kind, match=message):
        loss(x, x, **options)


@pytest.mark.parametrize("gamma", [-0.1, NAN, INF])
def test_bad_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match="sigmoid_focal_loss: gamma must be finite and at least 0"):
        fusedloss.sigmoid_focal_loss(torch.zeros(2), torch.zeros(2), gamma=gamma)


def test_modules(generator: Generator) -> None:
    x, t = torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator)
    weight = torch.rand(3, generator=generator)
    focal = fusedloss.nn.SigmoidFocalLoss(0.5, 1.5, ignore_index=-1, label_smoothing=0.1)
    settings = {"alpha": 0.5, "gamma": 1.5, "ignore_index": -1, "label_smoothing": 0.1}
    whole = {**settings, "sample_weight": weight}
    assert focal(x, t) == fusedloss.sigmoid_focal_loss(x, t, **settings)
    assert focal(x, t, sample_weight=weight) == fusedloss.sigmoid_focal_loss(x, t, **whole)
    assert "gamma=1.5" in repr(focal) and not focal.state_dict()
    bce = fusedloss.nn.BCEWithLogitsLoss(ignore_index=0, label_smoothing=0.1)
    assert repr(bce) == "BCEWithLogitsLoss(ignore_index=0, label_smoothing=0.1)"
    options: dict[str, Any] = {"ignore_index": 0, "label_smoothing": 0.1}
    function = fusedloss.binary_cross_entropy_with_logits
    assert bce(x, t) == function(x, t, **options)
    assert bce(x, t, sample_weight=weight) == function(x, t, sample_weight=weight, **options)
    plain = fusedloss.nn.BCEWithLogitsLoss()
    assert plain(x, t, sample_weight=weight) == function(x, t, sample_weight=weight)


def test_strict_looks_at_what_counts() -> None:
    x, t = torch.randn(20), torch.tensor([255.0, *[1.0] * 19])
    with fusedloss.checks("strict"):
        for loss in LOSSES:
            loss(x, t, ignore_index=255)
            with pytest.raises(ValueError, match=r"target\[0\] = 255"):
                loss(x, t)


def variance_gradients(function: Any, *given: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    function(*leaves, **options).backward()
    return [t.grad for t in leaves if t.grad is not None]


def test_gaussian_clamps_and_broadcasts_as_torch_does(generator: Generator) -> None:
    x, t = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator).unbind()
    for shape, full in itertools.product(((4, 3), (4,), (4, 1), (1, 3)), (False, True)):
        var = torch.rand(shape, dtype=torch.float64, generator=generator)
        options = {"eps": 0.4, "full": full}
        ours = variance_gradients(fusedloss.gaussian_nll_loss, x, t, var, **options)
        theirs = variance_gradients(torch.nn.functional.gaussian_nll_loss, x, t, var, **options)
        torch.testing.assert_close(ours, theirs)
    for number in (0.5, 0.1):
        ours = fusedloss.gaussian_nll_loss(x, t, number, eps=0.4)
        torch.testing.assert_close(
            ours, torch.nn.functional.gaussian_nll_loss(x, t, number, eps=0.4)
        )
    with pytest.raises(ValueError, match=r"var has negative entry/entries, -0.5 at \[1, 0\]"):
        fusedloss.gaussian_nll_loss(x, t, torch.tensor([1.0, -0.5, 1.0, 1.0]))
    with pytest.raises(ValueError, match="var is of incorrect size"):
        fusedloss.gaussian_nll_loss(x, t, torch.ones(3))
