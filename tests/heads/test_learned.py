"""Settings of heads that learn, and numbers of every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import name_of, same_bits
from problems import (
    Distillation,
    Problem,
    Results,
    close,
    exact,
    plain_divergence,
    plain_log_prob,
)
from torch import Generator, Tensor
from torch.autograd import forward_ad

import fusedloss
from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob
from fusedloss.core import trace


@pytest.mark.parametrize("scale", [100.0, 1e-3, -3.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_scale_that_learns_does_not_overflow_float16(autocast: bool, scale: float) -> None:
    """States of 700 times 100 are more than float16 holds; the logits are not."""
    states = torch.tensor([[700.0, 2.0], [1.0, 0.5]])
    weight = torch.tensor([[1e-3, 1.0], [2e-3, -1.0], [0.0, 0.25]])
    target, learned = torch.tensor([0, 2]), torch.tensor(scale, requires_grad=True)
    if not autocast:
        states, weight = states.half(), weight.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        value = linear_cross_entropy(states, weight, target, logit_scale=learned)
    (found,) = torch.autograd.grad(value, learned)
    wide = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    logits = wide * (states.half().double() @ weight.half().double().t())
    expected = torch.nn.functional.cross_entropy(logits, target)
    exactly = [expected, *torch.autograd.grad(expected, wide)]
    close([value.double(), found.double()], exactly, rtol=4e-3, atol=1e-5)


def kl(p: Distillation, **settings: Any) -> Tensor:
    return linear_kl_div(**p.tensors, **p.teacher, **settings, hard_weight=0.5)


def eager_kl(p: Distillation, **settings: Any) -> Tensor:
    logits = p.logits()
    return plain_divergence(**p.tensors, teacher_logits=logits, **settings, hard_weight=0.5)


def log_prob(p: Problem, **settings: Any) -> tuple[Tensor, ...]:
    return linear_log_prob(**p.tensors, **settings, statistics=True)  # type: ignore[return-value]


class Learned(NamedTuple):
    """A setting that learns: its value, ours and the definition, and whether the loop over chunks serves it."""

    value: float
    ours: Callable[[Any, Any], Tensor]
    plain: Callable[[Any, Any], Tensor]
    chunked: bool = False


LEARNED = {
    "scale": Learned(
        0.7,
        lambda p, s: linear_cross_entropy(**p.tensors, logit_scale=s),
        lambda p, s: exact(**p.tensors, logit_scale=s),
        True,
    ),
    "scale beside a softcap": Learned(
        -0.7,
        lambda p, s: linear_cross_entropy(**p.tensors, logit_scale=s, softcap=2.0, z_loss=0.1),
        lambda p, s: exact(**p.tensors, logit_scale=s, softcap=2.0, z_loss=0.1),
        True,
    ),
    "scale of 0": Learned(
        0.0,
        lambda p, s: linear_cross_entropy(**p.tensors, logit_scale=s),
        lambda p, s: exact(**p.tensors, logit_scale=s),
        True,
    ),
    "softcap": Learned(
        1.5,
        lambda p, k: linear_cross_entropy(**p.tensors, softcap=k, logit_scale=0.5),
        lambda p, k: exact(**p.tensors, softcap=k, logit_scale=0.5),
    ),
    "temperature": Learned(
        0.8,
        lambda p, t: log_prob(p, temperature=t)[0].sum(),
        lambda p, t: plain_log_prob(**p.tensors, temperature=t)[0].sum(),
        True,
    ),
    "entropy": Learned(
        0.8,
        lambda p, t: log_prob(p, temperature=t)[2].sum(),
        lambda p, t: plain_log_prob(**p.tensors, temperature=t)[2].sum(),
        True,
    ),
    "temperature beside a softcap": Learned(
        0.8,
        lambda p, t: log_prob(p, temperature=t, softcap=2.0)[0].sum(),
        lambda p, t: plain_log_prob(**p.tensors, temperature=t, softcap=2.0)[0].sum(),
    ),
    "softcap beside a temperature": Learned(
        1.5,
        lambda p, k: log_prob(p, temperature=0.8, softcap=k)[0].sum(),
        lambda p, k: plain_log_prob(**p.tensors, temperature=0.8, softcap=k)[0].sum(),
    ),
    "temperature of a teacher": Learned(
        0.8, lambda p, t: kl(p, temperature=t), lambda p, t: eager_kl(p, temperature=t)
    ),
    "softcap of a student": Learned(
        1.5, lambda p, k: kl(p, softcap=k), lambda p, k: eager_kl(p, softcap=k)
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_setting_learns(name: str, generator: Generator) -> None:
    problem, (value, ours, plain, chunked) = (
        Distillation(generator, shape=(11, 5, 7)),
        LEARNED[name],
    )
    setting = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    learned = [setting, *(problem.tensors[k].requires_grad_() for k in problem.learned)]
    assert (fusedloss.explain(ours, problem, setting).kernel is not None) == chunked
    found, expected = (f(problem, setting) for f in (ours, plain))
    close([found], [expected])
    close([*torch.autograd.grad(found, learned)], [*torch.autograd.grad(expected, learned)])
    torch.autograd.gradgradcheck(lambda s: ours(problem, s), setting)
    with torch.no_grad():
        close([ours(problem, setting)], [expected])
        close([ours(problem, setting.detach())], [expected])


@pytest.mark.parametrize("name", LEARNED)
def test_a_setting_under_transforms(name: str, generator: Generator) -> None:
    problem, learned = Distillation(generator, shape=(11, 5, 7)), LEARNED[name]
    value = torch.tensor(learned.value, dtype=torch.float64)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        found, expected = (
            transform(functools.partial(f, problem))(value) for f in (learned.ours, learned.plain)
        )
        close([found], [expected])
    several = torch.stack([value, value + 0.5])
    mapped = torch.func.vmap(functools.partial(learned.ours, problem))(several)
    close([mapped], [torch.stack([learned.plain(problem, v) for v in several])])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        slope = forward_ad.unpack_dual(learned.ours(problem, dual)).tangent
    close([slope], [torch.func.grad(functools.partial(learned.plain, problem))(value)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_scale_that_learns_is_compiled_whole(
    dtype: torch.dtype, reduction: str, generator: Generator
) -> None:
    """As CLIP's, of float32 beside whatever the model is of."""
    problem = Problem(generator, dtype)

    def loss(scale: Tensor, **tensors: Tensor) -> Tensor:
        loss = linear_cross_entropy(**tensors, logit_scale=scale.exp(), reduction=reduction)
        return loss.float().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        scale = torch.tensor(0.5, requires_grad=True)
        before = trace.calls()["linear_cross_entropy", "kernel"]
        function(scale, **problem.tensors).backward()
        assert trace.calls()["linear_cross_entropy", "kernel"] == before + 1
        gradients.append(scale.grad)
    wide = {k: t.double() if t.is_floating_point() else t for k, t in problem.tensors.items()}
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    exact(**wide, logit_scale=scale.exp(), reduction=reduction).sum().backward()
    for found in gradients:
        rtol = 1e-5 if dtype is torch.float32 else 0.02
        close([found], [scale.grad.float()], rtol=rtol, atol=0.0)


def test_what_is_infinite_has_no_part_in_the_gradient_by_a_scale(generator: Generator) -> None:
    """A class that a bias masks, and a row that is ignored."""
    problem = Problem(generator)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    problem.tensors["linear_bias"][3] = -torch.inf
    problem.tensors["target"][1] = 4
    problem.tensors["target"].masked_fill_(problem.tensors["target"] == 3, 4)
    finite = {**problem.tensors, "linear_bias": problem.tensors["linear_bias"].clamp(min=-1e4)}
    problem.tensors["input"] = problem.tensors["input"].clone()
    problem.tensors["input"][problem.tensors["target"] == -100] = torch.inf
    found, expected = (
        torch.autograd.grad(linear_cross_entropy(**t, logit_scale=scale), scale)
        for t in (problem.tensors, finite)
    )
    close([*found], [*expected])


REST: dict[str, Callable[..., Any]] = {
    "grad": lambda f, h, w: torch.func.grad(f, (0, 1))(h.detach(), w.detach()),
    "create_graph": lambda f, h, w: torch.autograd.grad(f(h, w), (h, w), create_graph=True),
    "vmap": lambda f, h, w: [
        t[0] for t in torch.vmap(torch.func.grad(f, (0, 1)))(h[None], w[None])
    ],
}


@pytest.mark.parametrize("how", REST)
@pytest.mark.parametrize("dropped", ["ignored", "weight 0"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_rows_that_do_not_count_take_part_in_no_product_of_the_formula(
    bad: float, dropped: str, how: str, generator: Generator
) -> None:
    """What they hold reaches neither the loss nor a gradient, as in the loop over chunks."""
    h, w, teacher = (torch.randn(5, 4, generator=generator).double() for _ in range(3))
    target, weight = torch.tensor([0, 1, 2, 3, 4]), torch.ones(5)
    q = torch.rand(5, 5, generator=generator).double()
    if dropped == "ignored":
        target[1] = -100
    else:
        weight[1] = q[1] = 0
    (h[1], q[1]) = (bad, bad) if dropped == "weight 0" else (bad, q[1])
    bare = h.clone().index_fill_(0, torch.tensor([1]), 0)
    settings = {"sample_weight": weight}
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda h, w: linear_cross_entropy(h, w, target, z_loss=0.1, **settings),
        lambda h, w: linear_cross_entropy(h, w, target, softcap=3.0, **settings),
        lambda h, w: linear_kl_div(h, w, teacher, w.detach(), target=target, **settings),
        lambda h, w: linear_kl_div(
            h, w, teacher_logits=q, target=target, hard_weight=0.5, **settings
        ),
    ]
    if dropped == "weight 0":
        losses.append(lambda h, w: linear_cross_entropy(h, w, q, **settings))
    else:
        losses.append(lambda h, w: linear_log_prob(h, w, target).sum())
    h, w = h.requires_grad_(), w.requires_grad_()
    for loss in losses:
        expected = torch.autograd.grad(loss(bare.requires_grad_(), w), (bare, w))
        close([*REST[how](loss, h, w)], [*expected])


def test_a_weight_of_rows_that_is_0_has_a_derivative(generator: Generator) -> None:
    problem = Problem(generator)
    given = {k: t.detach() for k, t in problem.tensors.items()}
    weight = problem.rewards()
    weight[2] = 0

    def gradient(v: Tensor) -> Tensor:
        h = given["input"]
        loss = lambda h: linear_cross_entropy(**{**given, "input": h}, sample_weight=v)  # noqa: E731
        return torch.func.grad(loss)(h).sum()

    def loss(v: Tensor) -> Tensor:
        return linear_cross_entropy(**given, sample_weight=v, reduction="sum")

    expected = linear_cross_entropy(**given, reduction="none")
    for derive in (torch.func.grad, torch.func.jacfwd):
        close([derive(loss)(weight)], [expected])
    close([torch.func.jacfwd(gradient)(weight)], [torch.func.grad(gradient)(weight)])
    assert torch.func.grad(gradient)(weight)[2] != 0


def test_a_traced_scale_breaks_no_graph(generator: Generator) -> None:
    """As that of an evaluation, which learns nothing."""
    problem = Problem(generator)
    given, scale = problem.tensors, torch.tensor(0.7, dtype=torch.float64)

    def both(scale: Tensor) -> Results:
        loss = linear_cross_entropy(**given, logit_scale=scale)
        return [loss, linear_log_prob(**given, temperature=scale)]  # type: ignore[list-item]

    close(torch.compile(both, fullgraph=True, backend="aot_eager")(scale), both(scale))


NUMBERS: list[tuple[Callable[..., Any], str]] = [
    *((linear_cross_entropy, k) for k in ("z_loss", "label_smoothing")),
    *((linear_kl_div, k) for k in ("beta", "soft_weight", "hard_weight", "teacher_softcap")),
]


CHECKED = [
    *NUMBERS,
    (linear_cross_entropy, "softcap"),
    (linear_cross_entropy, "logit_scale"),
    (linear_log_prob, "temperature"),
    (linear_kl_div, "temperature"),
]


def with_setting(function: Callable[..., Any], setting: Any, generator: Generator) -> Any:
    problem = Distillation(generator)
    teacher = problem.teacher if function is linear_kl_div else {}
    return function(**problem.tensors, **teacher, **setting)


@pytest.mark.parametrize(("function", "name"), NUMBERS)
def test_a_number_that_would_learn_is_refused(
    function: Callable[..., Any], name: str, generator: Generator
) -> None:
    setting = torch.tensor(0.5, requires_grad=True)
    words = f"{function.__name__}: argument '{name}' must be float, not Tensor that requires"
    with pytest.raises(TypeError, match=words):
        with_setting(function, {name: setting}, generator)
    with pytest.raises(TypeError, match=words):
        torch.func.grad(lambda s: with_setting(function, {name: s}, generator))(setting.detach())


@pytest.mark.parametrize(("function", "name"), CHECKED)
def test_numbers_of_every_kind(
    function: Callable[..., Any], name: str, generator: Generator
) -> None:
    state = generator.get_state()
    expected = with_setting(function, {name: 0.5}, generator)
    for value in (torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float16), np.float32(0.5)):
        generator.set_state(state)
        assert same_bits(with_setting(function, {name: value}, generator), expected)
    where = f"{function.__name__}: (argument ')?{name}"
    for bad, kind in (
        (torch.ones(1), TypeError),
        (torch.ones(1, requires_grad=True), TypeError),
        (torch.tensor(0.5 + 0j), TypeError),
        ("0.5", TypeError),
        ([0.5], TypeError),
    ):
        with pytest.raises(kind, match=where):
            with_setting(function, {name: bad}, generator)
    if name not in ("label_smoothing", "beta"):
        for nan in (float("nan"), torch.tensor(float("nan"))):
            with pytest.raises(ValueError, match=where):
                with_setting(function, {name: nan}, generator)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_settings_that_learn_are_checked(value: float, generator: Generator) -> None:
    setting = torch.tensor(value, requires_grad=True)
    for function, name in CHECKED[len(NUMBERS) :]:
        if name == "logit_scale" and value in (0.0, -1.0):
            continue
        with pytest.raises(ValueError, match=f"{function.__name__}: {name} must be finite"):
            with_setting(function, {name: setting}, generator)
