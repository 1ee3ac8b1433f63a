"""Losses of a linear head: the loop over chunks against the formula, float64 and PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from conftest import formula_path, name_of
from problems import (
    REDUCTIONS,
    SETTINGS,
    SMALL,
    STRETCHES,
    WIDE,
    C,
    D,
    Problem,
    close,
    each_reduction,
    exact,
    leaves,
    rising,
)
from torch import Generator, Tensor

import fusedloss
from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob
from fusedloss.core import trace


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("out", [(), (2, 2)])
@each_reduction
def test_loop_is_the_formula(
    setting: str, probabilities: bool, out: tuple[int, ...], reduction: str, generator: Generator
) -> None:
    problem = Problem(generator, out=out, probabilities=probabilities)
    settings = {**problem.settings(setting), "reduction": reduction}
    with formula_path():
        expected = problem.run(linear_cross_entropy, **settings)
    close(problem.run(linear_cross_entropy, **settings, memory_budget=SMALL), expected)
    close(problem.run(linear_cross_entropy, **settings), expected)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("setting", ["plain", "weight", "all"])
def test_loop_is_the_formula_over_many_classes(
    setting: str, probabilities: bool, generator: Generator
) -> None:
    problem = rising(Problem(generator, probabilities=probabilities, shape=WIDE))
    settings = problem.settings(setting)
    with formula_path():
        expected = problem.run(linear_cross_entropy, **settings)
    close(problem.run(linear_cross_entropy, **settings), expected)
    loss = linear_cross_entropy(**problem.tensors, **settings, memory_budget=STRETCHES)
    torch.testing.assert_close(loss, expected[0])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("probabilities", [False, True])
@each_reduction
def test_torch_steps(
    setting: str, probabilities: bool, reduction: str, generator: Generator, torch_steps: None
) -> None:
    problem = Problem(generator, probabilities=probabilities)
    settings = {**problem.settings(setting), "reduction": reduction}
    with formula_path():
        expected = problem.run(linear_cross_entropy, **settings)
    close(problem.run(linear_cross_entropy, **settings, memory_budget=SMALL), expected)


@pytest.mark.parametrize("setting", SETTINGS)
@each_reduction
def test_definition(setting: str, reduction: str, generator: Generator) -> None:
    problem = Problem(generator)
    settings = {**problem.settings(setting), "reduction": reduction}
    close(problem.run(linear_cross_entropy, **settings), problem.run(exact, **settings))


@each_reduction
def test_backward_twice_gives_the_same_bits(reduction: str, generator: Generator) -> None:
    problem = Problem(generator)
    inputs = leaves(problem)
    loss = linear_cross_entropy(**problem.tensors, reduction=reduction, memory_budget=SMALL)
    incoming = torch.randn(loss.shape, dtype=loss.dtype, generator=generator)
    first = torch.autograd.grad(loss, inputs, incoming, retain_graph=True)
    copies = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(loss, inputs, incoming)
    assert all(torch.equal(a, b) for a, b in zip(copies, second, strict=True))


@pytest.mark.parametrize("setting", ["plain", "all"])
@each_reduction
def test_every_derivative(setting: str, reduction: str, generator: Generator) -> None:
    problem = Problem(generator, shape=(4, 3, 5))
    settings = {**problem.settings(setting), "reduction": reduction}
    names = problem.learned

    def loss(*tensors: Tensor) -> Tensor:
        given = {**problem.tensors, **dict(zip(names, tensors, strict=True))}
        return linear_cross_entropy(**given, **settings)

    inputs = tuple(problem.tensors[k].requires_grad_() for k in names)
    torch.autograd.gradcheck(loss, inputs, check_batched_grad=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=True, fast_mode=True)
    # By forward mode and by torch.func, as by backward.
    wanted = tuple(range(len(names)))
    grads = torch.func.grad(lambda *t: loss(*t).sum(), wanted)(*(t.detach() for t in inputs))
    close(list(grads), list(torch.autograd.grad(loss(*inputs).sum(), inputs)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_compiled_whole(reduction: str, dtype: torch.dtype, generator: Generator) -> None:
    problem = Problem(generator, dtype)

    def loss(**tensors: Tensor) -> Tensor:
        return linear_cross_entropy(**tensors, reduction=reduction, z_loss=0.01)

    eager = problem.run(loss)
    before = trace.calls()["linear_cross_entropy", "kernel"]
    compiled = problem.run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    assert trace.calls()["linear_cross_entropy", "kernel"] == before + 1
    close(compiled, eager)
    problem.tensors["target"][3] = C
    with pytest.raises(IndexError, match=re.escape(f"target[3] = {C} is out of range")):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(**problem.tensors)


@pytest.mark.parametrize(
    "loss",
    [
        lambda h, w, y, s: linear_cross_entropy(h, w, y, softcap=s, logit_scale=s, z_loss=s),
        lambda h, w, y, s: linear_log_prob(h, w, y, temperature=s).sum(),
        lambda h, w, y, s: linear_kl_div(h, w, h, w + 1, temperature=s, soft_weight=s),
    ],
    ids=["cross_entropy", "log_prob", "kl_div"],
)
def test_compiled_with_numbers_that_vary(loss: Callable[..., Tensor], generator: Generator) -> None:
    """A schedule's, and with dynamic shapes even the defaults: no graph breaks."""
    tensors = Problem(generator).tensors
    given = [tensors[k] for k in ("input", "linear_weight", "target")]
    for dynamic in (None, True):
        torch._dynamo.reset()
        fast = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for number in (0.5, 0.75, 1.25):
            close([fast(*given, number)], [loss(*given, number)])
        plain = torch.compile(
            linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        close([plain(*given)], [linear_cross_entropy(*given)])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str, generator: Generator) -> None:
    problem = Problem(generator, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.run(linear_cross_entropy, reduction=reduction)
        eager = problem.run(exact, reduction=reduction)
    assert [t.dtype for t in found] == [t.dtype for t in eager]
    close(found, eager, rtol=0.05, atol=0.05)


def test_leading_dimensions(generator: Generator) -> None:
    problem = Problem(generator, out=(2,), shape=(24, D, C))
    flat = problem.run(linear_cross_entropy, reduction="none")
    shaped = dict(problem.tensors)
    problem.tensors["input"] = shaped["input"].reshape(4, 6, D)
    problem.tensors["target"] = shaped["target"].reshape(4, 6, 2)
    found = problem.run(linear_cross_entropy, reduction="none")
    assert found[0].shape == (4, 6, 2)
    close([t.reshape(f.shape) for t, f in zip(found, flat, strict=True)], flat)


def test_nothing_counts(generator: Generator) -> None:
    problem = Problem(generator)
    problem.tensors["target"].fill_(-100)
    loss, *grads = problem.run(linear_cross_entropy)
    assert loss.isnan() and not any(g.any() for g in grads)
    loss, *grads = problem.run(linear_cross_entropy, denominator=3.0)
    assert loss == 0 and not any(g.any() for g in grads)


def test_no_rows(generator: Generator) -> None:
    problem = Problem(generator, shape=(0, D, C))
    for reduction in REDUCTIONS:
        value, *grads = problem.run(linear_cross_entropy, reduction=reduction)
        assert value.shape == ((0,) if reduction == "none" else ())
        assert value.isnan().all() if reduction == "mean" else not value.any()
        assert all(not g.any() for g in grads)


def test_denominator(generator: Generator) -> None:
    """Of all steps of an accumulation, which then adds up to the whole batch."""
    problem = Problem(generator)
    whole = problem.run(linear_cross_entropy, reduction="sum")
    for count in (7.0, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)):
        close(problem.run(linear_cross_entropy, denominator=count), [t / 7 for t in whole])


@pytest.mark.parametrize("bias", [False, True])
def test_module(bias: bool, generator: Generator) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("an older torch")
    settings = {"out_features": (2,), "bias": bias, "label_smoothing": 0.1, "dtype": torch.float64}
    theirs = torch.nn.LinearCrossEntropyLoss(D, C, **settings)
    ours = fusedloss.nn.LinearCrossEntropyLoss(D, C, **settings, memory_budget=SMALL)
    ours.load_state_dict(theirs.state_dict())
    problem = Problem(generator, out=(2,))
    for module in (ours, theirs):
        module(problem.tensors["input"], problem.tensors["target"]).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    capped = fusedloss.nn.LinearCrossEntropyLoss(D, C, softcap=2.0, z_loss=0.1, logit_scale=0.5)
    input, target = torch.randn(3, D), torch.tensor([1, 2, 3])
    torch.testing.assert_close(
        capped(input, target, denominator=5.0),
        exact(
            *(input, capped.linear.weight, target),
            softcap=2.0,
            z_loss=0.1,
            logit_scale=0.5,
            reduction="sum",
        )
        / 5,
    )
