"""The divergences of a head from a teacher's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import HALVES, formula_path, name_of
from problems import (
    SMALL,
    WIDE,
    Distillation,
    close,
    double,
    each_divergence,
    each_reduction,
    leaves,
    plain_divergence,
    rising,
    without_kernels,
)
from torch import Generator, Tensor

from fusedloss import linear_kl_div

DISTILL: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "hard": {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.4},
    "softcap": {"softcap": 1.5, "temperature": 0.5, "hard_weight": 0.1},
}


@pytest.mark.parametrize("setting", DISTILL)
@each_divergence
@each_reduction
def test_divergence(divergence: str, setting: str, reduction: str, generator: Generator) -> None:
    problem = Distillation(generator)
    settings = {**DISTILL[setting], "divergence": divergence, "reduction": reduction, "beta": 0.3}
    if setting == "plain":
        del problem.tensors["target"]
    settings["sample_weight"] = problem.rewards()
    expected = problem.run(plain_divergence, **settings, teacher_logits=problem.logits())
    for teacher in (problem.teacher, {"teacher_logits": problem.logits()}):
        close(problem.run(linear_kl_div, **settings, **teacher), expected)
        close(problem.run(linear_kl_div, **settings, **teacher, memory_budget=SMALL), expected)
    with formula_path():
        close(problem.run(linear_kl_div, **settings, **problem.teacher), expected)


@each_divergence
def test_divergence_over_many_classes(divergence: str, generator: Generator) -> None:
    problem = rising(Distillation(generator, shape=WIDE))
    problem.teacher["teacher_bias"] += torch.linspace(0, 3, problem.c)
    settings = {**DISTILL["hard"], "divergence": divergence}
    expected = problem.run(plain_divergence, **settings, teacher_logits=problem.logits())
    close(problem.run(linear_kl_div, **settings, **problem.teacher), expected)


@each_divergence
def test_a_row_with_nan_is_nan(divergence: str, generator: Generator) -> None:
    """And so is its gradient, by every class: those before the NaN, and the largest far behind it."""
    problem = rising(Distillation(generator, shape=WIDE))
    problem.teacher["teacher_bias"] = torch.zeros_like(problem.teacher["teacher_bias"])
    del problem.tensors["target"]
    problem.tensors["linear_bias"][1] = torch.nan
    settings = {"divergence": divergence, "reduction": "none"}
    losses, *_, by_bias = problem.run(linear_kl_div, **settings, **problem.teacher)
    assert losses.isnan().all()
    assert by_bias.isnan().all()


@each_divergence
def test_divergence_of_what_has_no_probability(divergence: str, generator: Generator) -> None:
    """Classes that neither the teacher nor the student can take count for nothing."""
    problem = Distillation(generator)
    del problem.tensors["target"]
    problem.tensors["linear_bias"][5] = problem.teacher["teacher_bias"][5] = -torch.inf
    loss, *grads = problem.run(linear_kl_div, divergence=divergence, **problem.teacher)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    for tensors in (problem.tensors, problem.teacher):
        for name in [n for n in tensors if n.endswith(("weight", "bias"))]:
            tensors[name] = torch.cat([tensors[name][:5], tensors[name][6:]])
    torch.testing.assert_close(
        linear_kl_div(**problem.tensors, **problem.teacher, divergence=divergence), loss
    )


@each_divergence
def test_divergence_from_itself_is_0(divergence: str, generator: Generator) -> None:
    problem = Distillation(generator)
    names = {
        "teacher_input": "input",
        "teacher_weight": "linear_weight",
        "teacher_bias": "linear_bias",
    }
    teacher = {k: problem.tensors[name] for k, name in names.items()}
    loss, *grads = problem.run(linear_kl_div, divergence=divergence, **teacher)
    assert abs(loss) < 1e-14 and all(g.abs().max() < 1e-14 for g in grads)


@each_divergence
def test_divergence_by_torch_steps(
    divergence: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Distillation(generator)
    settings = {"divergence": divergence, "hard_weight": 0.5, **problem.teacher}
    expected = problem.run(linear_kl_div, **settings)
    without_kernels(monkeypatch)
    close(problem.run(linear_kl_div, **settings, memory_budget=6 * SMALL), expected)


@each_divergence
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_derivative_of_a_divergence(
    divergence: str, reduction: str, generator: Generator
) -> None:
    problem = Distillation(generator)
    settings = {"divergence": divergence, "reduction": reduction, **problem.teacher}

    def loss(**tensors: Tensor) -> Tensor:
        return linear_kl_div(**tensors, **settings)

    def of_input(x: Tensor) -> Tensor:
        return loss(**{**problem.tensors, "input": x})

    input = problem.tensors["input"].clone().requires_grad_()
    torch.autograd.gradcheck(of_input, input, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(of_input, input, fast_mode=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(problem.run(compiled), problem.run(loss))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=name_of)
@each_divergence
def test_divergence_in_other_types(
    divergence: str, dtype: torch.dtype, generator: Generator
) -> None:
    problem = Distillation(generator, dtype)
    settings: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5}
    wide = Distillation(generator)
    wide.tensors = {k: double(t) for k, t in problem.tensors.items()}
    wide.teacher = {k: double(t) for k, t in problem.teacher.items()}
    true = wide.run(plain_divergence, **settings, teacher_logits=wide.logits())
    found = problem.run(linear_kl_div, **settings, **problem.teacher, memory_budget=5 << 20)
    for ours, truth in zip(found, true, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - truth).abs().max() <= torch.finfo(
            dtype
        ).eps * 16 * truth.abs().max()


def test_no_gradient_flows_to_the_teacher(generator: Generator) -> None:
    problem = Distillation(generator)
    inputs = leaves(problem)
    teacher = {k: t.requires_grad_() for k, t in problem.teacher.items()}
    linear_kl_div(**problem.tensors, **teacher).backward()
    assert all(t.grad is not None for t in inputs)
    assert all(t.grad is None for t in teacher.values())


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("batch", [(0,), (0, 3), (2, 0)], ids=str)
def test_distillation_of_no_rows(batch: tuple[int, ...], target: bool, path: str) -> None:
    f64 = torch.float64
    given: dict[str, Any] = {
        "input": torch.zeros(*batch, 4, dtype=f64, requires_grad=True),
        "linear_weight": torch.ones(5, 4, dtype=f64, requires_grad=True),
        "teacher_input": torch.zeros(*batch, 3, dtype=f64),
        "teacher_weight": torch.ones(5, 3, dtype=f64),
    }
    if target:
        given |= {"target": torch.zeros(batch, dtype=torch.int64), "hard_weight": 1.0}
    for reduction, value in (("mean", torch.nan), ("sum", 0.0)):
        loss = linear_kl_div(**given, reduction=reduction)
        assert torch.equal(loss.isnan(), torch.tensor(value != 0.0)) and loss.dim() == 0
        grads = torch.autograd.grad(loss, [given["input"], given["linear_weight"]])
        assert not grads[0].numel() and not grads[1].nan_to_num(0.0).any()
    assert linear_kl_div(**given, reduction="none").shape == batch


@pytest.mark.parametrize("budget", [None, SMALL], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
def test_a_teacher_of_another_type(
    dtype: torch.dtype, budget: int | None, generator: Generator
) -> None:
    """Its bias, too, is taken in the type that the student's row step computes in."""
    problem = Distillation(generator, torch.float32)
    teacher = {k: t.to(dtype) for k, t in problem.teacher.items()}
    assert "teacher_bias" in teacher
    settings = {"memory_budget": budget, "exact_logits": True}
    wide = {k: double(t).float() for k, t in teacher.items()}
    expected = problem.run(linear_kl_div, **wide)
    close(problem.run(linear_kl_div, **teacher, **settings), expected, rtol=1e-3, atol=1e-4)
