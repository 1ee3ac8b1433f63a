"""The adaptive softmax is PyTorch's module: its state, its results, its errors; without its logits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import FLOATS, name_of
from torch import Generator, Tensor
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
from fusedloss import nn

D, C, CUTOFFS = 64, 50, [5, 13, 30]
SETTINGS: list[dict[str, Any]] = [{}, {"div_value": 2.0, "head_bias": True}, {"div_value": 3.0}]


def modules(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, Any]:
    """Ours and PyTorch's, with the same parameters."""
    torch.manual_seed(0)
    ours, theirs = (
        face.AdaptiveLogSoftmaxWithLoss(D, C, CUTOFFS, **settings, dtype=dtype)
        for face in (nn, torch.nn)
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def outcome(module: Any, x: Tensor, y: Tensor) -> list[Tensor | None]:
    leaf = x.clone().requires_grad_()
    found = module(leaf, y)
    incoming = torch.linspace(0.5, 1, found.output.numel(), dtype=x.dtype).reshape(y.shape)
    total = (found.output * incoming).sum() + found.loss
    grads = torch.autograd.grad(total, [leaf, *module.parameters()], allow_unused=True)
    return [found.output.detach(), found.loss.detach(), *grads]


TARGETS = {
    "all": torch.arange(C),
    "head": torch.tensor([0, 4, 4, 1]),
    "one cluster": torch.tensor([31, 49, 30]),
    "one row": torch.tensor([6]),
    "no batch": torch.tensor(20),
    "int32": torch.tensor([3, 40, 6], dtype=torch.int32),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_equals_torch(
    target: str, settings: dict[str, Any], dtype: torch.dtype, generator: Generator
) -> None:
    """Of a cluster that no target is in, no parameter has a gradient, either."""
    ours, theirs = modules(dtype, **settings)
    y = TARGETS[target]
    x = torch.randn((*y.shape, D), generator=generator).to(dtype)
    rtol = (
        0.1 if dtype in FLOATS[2:] else None
    )  # theirs rounds the logits and every step after them
    atol = 0.05 if dtype in FLOATS[2:] else None
    for a, b in zip(outcome(ours, x, y), outcome(theirs, x, y.long()), strict=True):
        if a is None or b is None:
            assert a is b
            continue
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_the_state_is_that_of_torch() -> None:
    ours, theirs = modules(head_bias=True)
    assert repr(ours) == repr(theirs) and isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, y = torch.randn(6, D, dtype=torch.float64), torch.arange(6)
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(other) is type(ours)
        assert torch.equal(other(x, y).output, ours(x, y).output)
    assert type(ours(x, y)) is type(theirs(x, y))
    assert torch.equal(ours.log_prob(x), theirs.log_prob(x))
    assert torch.equal(ours.predict(x), theirs.predict(x))
    assert torch.allclose(ours(x, y).output, ours.log_prob(x).gather(1, y[:, None])[:, 0])


def test_derivatives(generator: Generator) -> None:
    ours, _ = modules(head_bias=True)
    x = torch.randn(6, D, dtype=torch.float64, generator=generator).requires_grad_()
    y = torch.tensor([0, 4, 6, 20, 45, 30])
    weight = ours.tail[1][1].weight

    def of(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(ours, {"tail.1.1.weight": weight}, (x, y))

    assert gradcheck(of, (x, weight), check_forward_ad=True)
    assert gradgradcheck(of, (x, weight))


def test_no_batch_at_all() -> None:
    ours, theirs = modules()
    x, y = torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    found, expected = ours(x, y), theirs(x, y)
    assert found.output.shape == expected.output.shape == (0,)
    assert found.loss.isnan() and expected.loss.isnan()


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((4, D), torch.tensor([1, 2, 3]), "same size in the batch dimension"),
        ((4, D), torch.tensor([[1, 2, 3, 4]]), "multi-target not supported"),
        ((4, D), torch.tensor(1), "0D target tensor expects 1D input"),
        ((2, 3, D), torch.tensor([1, 2]), "1D target tensor expects 2D input"),
        ((2, D), torch.tensor([1, C]), r"target\[1\] = 50 .* should be in \[0, 49\]"),
        ((2, D), torch.tensor([-1, 1]), r"target\[0\] = -1 .* range \[-1, 1\]"),
        ((2, D), torch.tensor([1.0, 2.0]), "target must be of integers"),
        (
            (2, D + 1),
            torch.tensor([1, 2]),
            r"^AdaptiveLog.*: input \[2, \d+\] must have \d+ features",
        ),
    ],
)
def test_refuses(shape: tuple[int, ...], target: Tensor, message: str) -> None:
    ours, theirs = modules()
    for module in (ours, theirs):
        with pytest.raises(RuntimeError) as caught:
            module(torch.zeros(shape, dtype=torch.float64), target)
    with pytest.raises(RuntimeError, match=message):
        ours(torch.zeros(shape, dtype=torch.float64), target)
    assert caught.type is RuntimeError


@pytest.mark.parametrize("cutoffs", [[], [5, 5], [13, 5], [0, 5], [5, C], [5.5]])
def test_cutoffs_are_refused_as_by_torch(cutoffs: list[int]) -> None:
    for face in (nn, torch.nn):
        with pytest.raises(ValueError, match="cutoffs should be a sequence"):
            face.AdaptiveLogSoftmaxWithLoss(D, C, cutoffs)


def test_the_same_bits_for_any_number_of_threads(generator: Generator) -> None:
    ours, _ = modules(torch.float32)
    x = torch.randn(300, D, generator=generator)
    y = torch.randint(C, (300,), generator=generator)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(ours(x, y).output)
    torch.set_num_threads(1)
    assert torch.equal(*found)


def test_the_kernel_serves_it_and_hooks_are_called(generator: Generator) -> None:
    ours, _ = modules()
    x = torch.randn(5, D, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 6, 20, 45, 1])
    assert fusedloss.explain(ours, x, y).kernel == "linear"
    before, seen = ours(x, y), []
    ours.tail[0][1].register_forward_hook(lambda *_: seen.append(1))
    after = ours(x, y)
    assert seen == [1]
    torch.testing.assert_close(tuple(after), tuple(before))
