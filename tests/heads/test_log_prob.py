"""The log-probabilities of a head, and the statistics beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import formula_path
from problems import (
    SMALL,
    STRETCHES,
    WIDE,
    C,
    N,
    Problem,
    Subclass,
    arguments,
    close,
    leaves,
    plain_log_prob,
    rising,
)
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812

from fusedloss import linear_log_prob
from fusedloss.losses import heads as linear


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("statistics", [False, True])
def test_log_prob(statistics: bool, settings: dict[str, Any], generator: Generator) -> None:
    problem = Problem(generator)
    problem.tensors["target"][:8] = F.linear(*list(problem.tensors.values())[:3]).argmax(1)[
        :8
    ]  # some are correct
    settings = {**settings, "statistics": statistics}
    expected = problem.run(plain_log_prob, **settings)
    close(problem.run(linear_log_prob, **settings), expected)
    close(problem.run(linear_log_prob, **settings, memory_budget=SMALL), expected)
    with formula_path():
        close(problem.run(linear_log_prob, **settings), expected)
    compiled = torch.compile(
        lambda **tensors: linear_log_prob(**tensors, **settings),
        fullgraph=True,
        backend="aot_eager",
    )
    close(problem.run(compiled), expected)


def test_log_prob_over_many_classes(generator: Generator) -> None:
    problem = rising(Problem(generator, shape=WIDE))
    expected = problem.run(plain_log_prob)
    close(problem.run(linear_log_prob, statistics=True), expected)
    found = linear_log_prob(**problem.tensors, statistics=True, memory_budget=STRETCHES)
    close([*found], expected[: len(found)])


def test_log_prob_by_torch_steps(generator: Generator, torch_steps: None) -> None:
    problem = Problem(generator)
    expected = problem.run(plain_log_prob)
    close(problem.run(linear_log_prob, statistics=True, memory_budget=6 * SMALL), expected)


def test_log_prob_of_one_statistic(generator: Generator) -> None:
    """Gradients of some results alone, and of every order."""
    problem = Problem(generator, shape=(4, 3, 5))
    inputs = leaves(problem)
    for k in range(3):
        ours = linear_log_prob(**problem.tensors, statistics=True)[k].sum()
        plain = plain_log_prob(**problem.tensors)[k].sum()
        close(list(torch.autograd.grad(ours, inputs)), list(torch.autograd.grad(plain, inputs)))

    def entropy(*tensors: Tensor) -> Tensor:
        given = dict(zip(problem.learned, tensors, strict=True))
        return linear_log_prob(**{**problem.tensors, **given}, statistics=True).entropy

    torch.autograd.gradgradcheck(entropy, inputs, fast_mode=True)


def test_log_prob_of_bad_input() -> None:
    problem = Problem(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="linear_log_prob: temperature must be finite and greater"):
        linear_log_prob(**problem.tensors, temperature=0.0)
    with pytest.raises(RuntimeError, match="linear_log_prob: target holds probabilities"):
        linear_log_prob(**{**problem.tensors, "target": torch.zeros(N, C)})


def test_statistics_of_subclasses(generator: Generator) -> None:
    """All results are of the subclass, as `Tensor.__torch_function__` makes them."""
    given = arguments("log_prob", generator)
    expected = linear_log_prob(**given, statistics=True)
    for name in ("input", "linear_weight", "target"):
        odd = given | {name: given[name].as_subclass(Subclass)}
        found = linear_log_prob(**odd, statistics=True)
        assert type(found) is linear.LogProb and {*map(type, found)} == {Subclass}
        close([t.as_subclass(Tensor) for t in found], [*expected])
    assert expected._replace(lse=None) == linear.LogProb(**{**expected._asdict(), "lse": None})
