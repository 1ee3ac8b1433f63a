"""Bad input of heads: the exception, and the words that name what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import FUNCTIONS, C, D, Distillation, N, Problem, arguments, freed
from torch import Generator, Tensor

from fusedloss import linear_cross_entropy, linear_kl_div

BAD_DISTILLATION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 0.0}, ValueError, "temperature must be finite and greater than 0, got 0.0"),
    (
        {"divergence": "kl"},
        ValueError,
        "divergence must be one of 'forward', 'reverse', 'js', got 'kl'",
    ),
    ({"beta": 1.0}, ValueError, "beta must be between 0 and 1, got 1.0"),
    ({"target": None, "hard_weight": 1.0}, ValueError, "hard_weight = 1.0 needs a target"),
    ({"teacher_weight": None}, ValueError, "the teacher is either"),
    ({"teacher_logits": torch.zeros(N, C)}, ValueError, "the teacher is either"),
    (
        {"teacher_weight": torch.zeros(C, 6).double()},
        RuntimeError,
        f"teacher_input [{N}, 7] and teacher_weight [{C}, 6]",
    ),
    (
        {"teacher_weight": torch.zeros(C - 1, 7).double(), "teacher_bias": None},
        RuntimeError,
        f"the teacher's logits are of shape [{N}, {C - 1}], the student's of [{N}, {C}]",
    ),
    (
        {"teacher_bias": torch.zeros(3).double()},
        RuntimeError,
        f"expected teacher_bias shape ({C},)",
    ),
    ({"softcap": -1.0}, ValueError, "softcap must be finite and greater than 0, got -1.0"),
    ({"memory_budget": 10}, ValueError, "does not hold one row"),
    ({"target": torch.full((N,), C)}, IndexError, f"target[0] = {C} is out of range"),
]


@pytest.mark.parametrize(
    ("changes", "kind", "words"), BAD_DISTILLATION, ids=[words for _, _, words in BAD_DISTILLATION]
)
def test_bad_distillation(changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    problem = Distillation(torch.Generator().manual_seed(0))
    with pytest.raises(kind, match=re.escape(words)) as caught:
        linear_kl_div(**{**problem.tensors, **problem.teacher, **changes})
    assert str(caught.value).startswith("linear_kl_div: ")


def bad(**changes: Any) -> Callable[[], Tensor]:
    problem = Problem(torch.Generator().manual_seed(0), torch.float32)
    return lambda: linear_cross_entropy(**{**problem.tensors, **changes})


def f32(*shape: int) -> Tensor:
    return torch.zeros(shape)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": f32(N, 7)}, RuntimeError, f"input [{N}, 7] and linear_weight [{C}, {D}]"),
    ({"input": f32()}, RuntimeError, "dimensionality"),
    (
        {"linear_weight": f32(D)},
        RuntimeError,
        "linear_weight with dimensionality at least 2, got 1",
    ),
    (
        {"linear_bias": f32(C - 1)},
        RuntimeError,
        f"expected linear_bias shape ({C},), got ({C - 1},)",
    ),
    (
        {"linear_weight": torch.zeros(C, D, dtype=torch.bfloat16)},
        RuntimeError,
        "linear_weight is of torch.bfloat16, input of torch.float32",
    ),
    ({"input": torch.zeros(N, D, dtype=torch.int64)}, NotImplementedError, "input"),
    ({"input": [1.0]}, TypeError, "argument 'input'"),
    ({"target": [1]}, TypeError, "argument 'target'"),
    ({"target": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, f"batch_size ({N})"),
    ({"target": f32(N)}, RuntimeError, "expected target dtype to be Long"),
    (
        {"target": torch.full((N,), C)},
        IndexError,
        f"target[0] = {C} is out of range for {C} classes",
    ),
    ({"target": torch.full((N,), -1)}, IndexError, "target[0] = -1"),
    ({"target": torch.zeros(N, C, dtype=torch.int64)}, RuntimeError, "Expected floating point"),
    ({"target": f32(N, C), "ignore_index": 1}, RuntimeError, "ignore_index cannot be specified"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index"),
    ({"weight": f32(C + 1)}, RuntimeError, f"for all {C} classes"),
    ({"weight": torch.ones(C).double()}, RuntimeError, "scalar type Float but found Double"),
    (
        {"label_smoothing": 1.5},
        RuntimeError,
        "label_smoothing must be between 0.0 and 1.0. Got: 1.5",
    ),
    ({"reduction": "average"}, ValueError, "average is not a valid value for reduction"),
    ({"sample_weight": f32(N + 1)}, RuntimeError, f"the losses, [{N}], got [{N + 1}]"),
    ({"softcap": 0.0}, ValueError, "softcap must be finite and greater than 0, got 0.0"),
    ({"softcap": float("nan")}, ValueError, "softcap"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be finite, got inf"),
    ({"z_loss": float("nan")}, ValueError, "z_loss must be finite, got nan"),
    ({"memory_budget": 100}, ValueError, "memory_budget = 100 bytes does not hold one row"),
    ({"memory_budget": -1}, ValueError, "memory_budget must be above 0, got -1"),
    ({"memory_budget": 1.5}, TypeError, "memory_budget"),
    (
        {"denominator": f32(2)},
        ValueError,
        "denominator must be a number or a 0-dim tensor, got [2]",
    ),
    ({"denominator": 1.0, "reduction": "sum"}, ValueError, "denominator is for reduction = 'mean'"),
    ({"target": torch.zeros(N, device="meta")}, RuntimeError, "target is on meta, input on cpu"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_input(changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)) as caught:
        bad(**changes)()
    assert str(caught.value).startswith("linear_cross_entropy: ")


def test_the_least_budget_is_enough() -> None:
    with pytest.raises(ValueError, match="the least is") as caught:
        bad(memory_budget=1)()
    least = int(re.search(r"the least is (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert bad(memory_budget=least)().isfinite()
    with pytest.raises(ValueError, match="memory_budget"):
        bad(memory_budget=least - 1)()


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "freed": (freed, "the storage of {} was freed"),
    "sparse": (lambda t: t.to_sparse(), "{} has layout torch.sparse_coo"),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_nobody_can_read_is_refused_by_name(kind: str, how: str, generator: Generator) -> None:
    given, function = arguments(kind, generator), FUNCTIONS[kind]
    make, words = REFUSED[how]
    for name in [k for k, t in given.items() if isinstance(t, Tensor)]:
        message = f"{function.__name__}: {words.format(name)}"
        with pytest.raises(RuntimeError, match=message):
            function(**given | {name: make(given[name])})


def test_a_denominator_elsewhere_is_refused(generator: Generator) -> None:
    problem = Problem(generator)
    denominator = torch.tensor(3.0, device="meta")
    with pytest.raises(RuntimeError, match="denominator is on meta, input on cpu"):
        linear_cross_entropy(**problem.tensors, denominator=denominator)
