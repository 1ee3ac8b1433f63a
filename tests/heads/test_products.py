"""The matrix products of a head: their types, their digits, and those that are not taken."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import HALVES, formula_path, name_of
from problems import (
    SMALL,
    Distillation,
    N,
    Problem,
    close,
    double,
    each_reduction,
    error,
    exact,
    leaves,
)
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812

from fusedloss import linear_cross_entropy, linear_kl_div
from fusedloss.engines.chunks import loop as chunks
from fusedloss.engines.chunks import products, straight
from fusedloss.engines.cpu import linear as kernel
from fusedloss.route import heads, memo


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=name_of)
@pytest.mark.parametrize("setting", ["plain", "all"])
@each_reduction
def test_errors_are_no_larger_than_eagers(
    dtype: torch.dtype, setting: str, reduction: str, generator: Generator
) -> None:
    shape = (96, 64, 1500)
    problem = Problem(generator, dtype, shape=shape)
    settings = {**problem.settings(setting), "reduction": reduction}
    found = problem.run(linear_cross_entropy, **settings, memory_budget=5 << 20)
    eager = problem.run(exact, **settings)
    wide = Problem(generator, shape=shape)
    wide.tensors = {k: double(t) for k, t in problem.tensors.items()}
    true = wide.run(exact, **{k: double(v) for k, v in settings.items()})
    for ours, theirs, truth in zip(found, eager, true, strict=True):
        assert ours.dtype == dtype
        rounding = torch.finfo(dtype).eps / 4 * truth.abs().max()
        assert error(ours, truth) <= 1.1 * error(theirs, truth) + rounding


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="an older torch")
@pytest.mark.parametrize(("native", "bound"), [(False, 0.5), (True, 0.75)])
def test_less_error_than_torchs_chunks_in_bfloat16(
    native: bool, bound: float, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: native)
    shape = (256, 64, 1000)
    problem = Problem(generator, torch.bfloat16, shape=shape)
    del problem.tensors["linear_bias"]
    problem.learned.remove("linear_bias")
    wide = Problem(generator, shape=shape)
    wide.tensors = {k: double(t) for k, t in problem.tensors.items()}
    wide.learned = problem.learned
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    *_, true = wide.run(F.linear_cross_entropy)
    *_, theirs = problem.run(F.linear_cross_entropy, options=options)
    *_, ours = problem.run(linear_cross_entropy, options=options)
    assert error(ours, true) <= bound * error(theirs, true)


@pytest.mark.parametrize("setting", ["plain", "all"])
@each_reduction
def test_bfloat16_by_the_machines_own_products(
    setting: str, reduction: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(generator, torch.bfloat16)
    settings = {**problem.settings(setting), "reduction": reduction}
    with formula_path():
        expected = problem.run(linear_cross_entropy, **settings)
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    found = problem.run(linear_cross_entropy, **settings, memory_budget=5 << 20)
    close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (33, 64, 1000)])
def test_bfloat16_products_lose_no_digits_of_the_logits(
    shape: tuple[int, int, int], generator: Generator
) -> None:
    n, d, c = shape
    x, weight = (torch.randn(s, d, generator=generator).bfloat16() for s in (n, c))
    high = torch.empty(n, c, dtype=torch.bfloat16)
    own = products.Native(weight, None)
    own.logits(x, high)
    low = own.lost(x, high)
    exact = F.linear(x.double(), weight.double())
    torch.testing.assert_close(
        high.double() + low.double(), exact, rtol=2**-15, atol=2**-16 * exact.abs().max().item()
    )


@pytest.mark.parametrize("budget", [None, 5 << 20], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_kl_div])
@pytest.mark.parametrize("size", [0.5, 2.0, 8.0])
def test_rounded_logits_cost_a_quarter_of_the_error(
    size: float,
    function: Any,
    budget: int | None,
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they would cost more, or are asked for, they are exact."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    problem = Distillation(generator, torch.bfloat16, shape=(150, 64, 2000))
    problem.tensors["linear_weight"] *= size
    problem.tensors["linear_bias"] *= size / 4
    problem.learned = ["input", "linear_weight"]
    wide = Distillation(generator, shape=(150, 64, 2000))
    wide.tensors = {k: double(t) for k, t in problem.tensors.items()}
    wide.learned = problem.learned
    settings = {} if function is linear_cross_entropy else {"teacher_logits": problem.logits()}
    true = wide.run(function, **{k: double(t) for k, t in settings.items()})
    taken: list[int] = []
    lost = products.rounded_away

    def counted(x: Tensor, *rest: Tensor) -> Tensor:
        taken.append(len(x))
        return lost(x, *rest)

    for module in (products, straight):
        monkeypatch.setattr(module, "rounded_away", counted)
    rows = int((problem.tensors["target"] != -100).sum())
    found = problem.run(function, **settings, memory_budget=budget)
    assert sum(taken) == {0.5: 0, 8.0: rows}.get(size, sum(taken))
    taken.clear()
    exact = problem.run(function, **settings, memory_budget=budget, exact_logits=True)
    assert sum(taken) == rows
    for ours, digits, truth in zip(found[1:], exact[1:], true[1:], strict=True):
        apart = [(g.double() - truth).norm() for g in (ours, digits)]
        assert apart[0] <= 1.25 * apart[1]


def test_infinite_logits_of_bfloat16_products(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(generator, torch.bfloat16)
    problem.tensors["linear_bias"][:2] = -torch.inf
    problem.tensors["target"].clamp_(min=2)
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    results = problem.run(linear_cross_entropy)
    assert all(r.isfinite().all() for r in results)
    assert not results[2][:2].any() and not results[3][:2].any()


def test_rows_that_do_not_count_take_part_in_no_product(generator: Generator) -> None:
    problem = Problem(generator)
    input, target = problem.tensors["input"], problem.tensors["target"]
    input[target == -100] = float("nan")
    weight = torch.ones(N, dtype=torch.float64)
    weight[1] = 0
    input[1] = float("inf")
    results = problem.run(linear_cross_entropy, sample_weight=weight)
    assert all(r.isfinite().all() for r in results)
    assert not results[1][target == -100].any()


def test_only_the_gradients_that_are_needed(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(generator)
    whole = problem.run(linear_cross_entropy)
    names = ["input", "linear_weight", "linear_bias"]
    calls: list[str] = []
    for product in ("grad_input", "grad_weight"):
        original = getattr(products.Direct, product)

        def counted(self: Any, *args: Any, name: str = product, then: Any = original) -> None:
            calls.append(name)
            then(self, *args)

        monkeypatch.setattr(products.Direct, product, counted)
    multiply = torch.mm

    def multiplied(*given: Tensor, **out: Tensor) -> Tensor:
        calls.append("mm")
        return multiply(*given, **out)

    monkeypatch.setattr(torch, "mm", multiplied)
    for wanted in itertools.chain.from_iterable(
        itertools.combinations(range(3), size) for size in (1, 2)
    ):
        problem.learned = [names[k] for k in wanted]
        calls.clear()
        expected = [whole[0], *(whole[1 + k] for k in wanted)]
        of_products = {f"grad_{name.removeprefix('linear_')}" for name in problem.learned}
        of_products -= {"grad_bias"}
        close(problem.run(linear_cross_entropy, memory_budget=SMALL), expected)
        assert set(calls) - {"mm"} == of_products
        memo.known.clear()
        calls.clear()
        close(problem.run(linear_cross_entropy), expected)
        assert calls == ["mm"] * (1 + len(of_products))


def test_the_result_of_float16_scales_before_it_rounds(generator: Generator) -> None:
    """Its gradients would be 0 if they were stored in it before a loss scaler's factor."""
    problem = Problem(generator, torch.float16)
    inputs = leaves(problem)
    loss = linear_cross_entropy(**problem.tensors, denominator=2.0**30)
    (grad,) = torch.autograd.grad(loss, inputs[:1], torch.tensor(2.0**15, dtype=torch.float16))
    assert grad.dtype is torch.float16 and grad.any()


def test_options(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("an older torch")
    seen: list[int] = []
    step = kernel.step

    def counted(call: Any, logits: Any, *args: Any, **kwargs: Any) -> int:
        seen.append(logits.values.shape[0])
        return step(call, logits, *args, **kwargs)

    monkeypatch.setattr(kernel, "step", counted)
    monkeypatch.setattr(chunks, "straight", lambda *_: False)
    monkeypatch.setattr(heads, "remember", lambda *_: None)
    problem = Problem(generator)
    problem.tensors["target"].clamp_(min=0)
    whole = problem.run(linear_cross_entropy)
    assert seen == [N]
    for options, most in (
        (torch.nn.LinearCrossEntropyOptions(batch_chunk_size=10), 10),
        (torch.nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio"), 16),
    ):
        seen.clear()
        close(problem.run(linear_cross_entropy, options=options), whole)
        assert sum(seen) == N and max(seen) <= most
