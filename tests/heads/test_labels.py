"""Labels of every type, and what a mean divides by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HALVES, name_of, same_bits
from problems import (
    INTEGERS,
    Distillation,
    Problem,
    backward,
    close,
    default_dtype,
    tensors_of,
)
from torch import Generator, Tensor

from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob


def heads(generator: Generator, classes: int) -> list[Callable[..., Any]]:
    """All three, of float64, as functions of target and ignore_index."""
    h, w, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((6, 4), (classes, 4), (classes,))
    )
    weight = torch.rand(classes, dtype=torch.float64, generator=generator) + 0.5
    teacher = {"teacher_input": 2 * h, "teacher_weight": w, "hard_weight": 0.5}
    return [
        lambda t, i: linear_cross_entropy(h, w, t, linear_bias=bias, weight=weight, ignore_index=i),
        lambda t, i: linear_log_prob(h, w, t, ignore_index=i, statistics=True),
        lambda t, i: linear_kl_div(h, w, **teacher, target=t, ignore_index=i),
    ]


@pytest.mark.parametrize("dtype", INTEGERS, ids=name_of)
def test_labels_of_every_integer_type(dtype: torch.dtype, path: str, generator: Generator) -> None:
    """A class never is an index to ignore that its type does not hold."""
    most = min(torch.iinfo(dtype).max, 255)
    for ignored, function in itertools.product((-1, -100, 255, 300), heads(generator, 256)):
        for first in range(0, 250, 6) if path == "chunks" else (0, most - 99, most - 5):
            target = torch.arange(first, first + 6).clamp(max=most)
            found, expected = function(target.to(dtype), ignored), function(target, ignored)
            for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
                assert same_bits(a, b)


def test_labels_that_no_type_of_theirs_ignores(generator: Generator) -> None:
    target = torch.tensor([0, 1, 2, 3, 4, -1], dtype=torch.int8)
    for function in heads(generator, 10):
        with pytest.raises(IndexError, match=r"target\[5\] = -1 is out of range"):
            function(target, 255)


DIVISORS: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "count": lambda p: {},
    "class weights": lambda p: {"weight": p.normal(p.c).abs() + 0.1},
    "sample_weight": lambda p: {"sample_weight": p.rewards()},
    "bfloat16 sample_weight": lambda p: {"sample_weight": p.rewards().bfloat16()},
    "integer sample_weight": lambda p: {"sample_weight": torch.arange(p.n) % 3},
    "both": lambda p: {"sample_weight": p.rewards(), "weight": p.normal(p.c).abs() + 0.1},
    "number": lambda p: {"denominator": 7},
    "float16": lambda p: {"denominator": torch.tensor(7.3, dtype=torch.float16)},
    "bfloat16": lambda p: {"denominator": torch.tensor(7.3, dtype=torch.bfloat16)},
    "float32": lambda p: {"denominator": torch.tensor(7.3)},
    "int64": lambda p: {"denominator": torch.tensor(7)},
    "uint8": lambda p: {"denominator": torch.tensor(7, dtype=torch.uint8)},
}


def divisor(problem: Problem, settings: dict[str, Any]) -> Tensor:
    denominator, weight = settings.get("denominator"), settings.get("weight")
    if denominator is not None:
        return torch.as_tensor(denominator).double()
    target = problem.tensors.get("target")
    if target is None or target.is_floating_point():
        return torch.tensor(problem.n, dtype=torch.float64)
    counted = target[target != -100]
    each = torch.ones(problem.c) if weight is None else weight
    return each[counted].double().sum()


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("kind", DIVISORS)
def test_mean_is_sum_over_a_float64_divisor(
    kind: str, default: torch.dtype, path: str, generator: Generator
) -> None:
    problem, probable = Problem(generator), Problem(generator, probabilities=True)
    distilled = Distillation(generator)
    settings = DIVISORS[kind](problem)
    cases: list[tuple[Problem, Callable[..., Any], dict[str, Any]]] = [
        (problem, linear_cross_entropy, settings),
        (probable, linear_cross_entropy, settings),
    ]
    if "weight" not in settings:
        cases.append((distilled, linear_kl_div, {**settings, **distilled.teacher}))
    for case, function, given in cases:
        whole = {k: v for k, v in given.items() if k != "denominator"}
        with default_dtype(default):
            mean = backward(case, function, given | {"reduction": "mean"})
            total = backward(case, function, whole | {"reduction": "sum"})
        for a, b in zip(mean, total, strict=True):
            exact = b / divisor(case, given)
            assert (a - exact).abs().max() <= 1e-14 * exact.abs().max()


@pytest.mark.parametrize("kind", DIVISORS)
def test_float32_heads_under_a_bfloat16_default(kind: str, path: str, generator: Generator) -> None:
    problem = Problem(generator, torch.float32)
    settings = DIVISORS[kind](problem)
    expected = backward(problem, linear_cross_entropy, settings)
    with default_dtype(torch.bfloat16):
        found = backward(problem, linear_cross_entropy, settings)
    close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_sum_of_float16_class_weights_beyond_its_range(path: str, generator: Generator) -> None:
    problem = Problem(generator, torch.float16, shape=(64, 19, 53))
    weight = torch.full((53,), 6000.0, dtype=torch.float16)
    found = backward(problem, linear_cross_entropy, {"weight": weight})
    plain = backward(problem, linear_cross_entropy, {})
    assert found[0] > 1
    close(found, plain, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_types_under_a_float64_default(
    dtype: torch.dtype, reduction: str, path: str, generator: Generator
) -> None:
    problem = Problem(generator, dtype)
    distilled = Distillation(generator, dtype)
    for case, function, settings in (
        (problem, linear_cross_entropy, {}),
        (distilled, linear_kl_div, distilled.teacher),
    ):
        settings = {**settings, "reduction": reduction}
        expected = backward(case, function, settings)
        with default_dtype(torch.float64):
            found = backward(case, function, settings)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype is b.dtype and same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_the_gradient_by_probabilities_of_a_certain_class_keeps_its_digits(
    dtype: torch.dtype,
) -> None:
    """It is -log p, where p rounds to 1."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=dtype)
    weight = torch.tensor([[25.0, 0.0], [0.0, 0.0], [1.0, 2.0]], dtype=dtype)
    target = torch.tensor([[0.9, 0.1, 0.0]], dtype=dtype, requires_grad=True)
    linear_cross_entropy(hidden, weight, target).backward()
    rest = math.log1p(math.exp(-25) + math.exp(-24))
    want = torch.tensor([[rest, 25 + rest, 24 + rest]], dtype=torch.float64)
    torch.testing.assert_close(
        target.grad.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=0.0
    )
