"""Linear heads on what strangers bring: odd types, tensors without memory, settings that learn."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import HALVES, formula_path, name_of, same_bits
from test_linear import (
    Distillation,
    Problem,
    close,
    exact,
    plain_divergence,
    plain_log_prob,
)
from torch import Generator, Tensor
from torch.autograd import forward_ad

import fusedloss
from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob
from fusedloss.autograd import operators
from fusedloss.core import trace
from fusedloss.engines.chunks import loop as chunks
from fusedloss.losses import heads as linear

Results = list[Tensor]
INTEGERS = (
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=["chunks", "formula", "operator", "steps"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way to compute a head on the CPU."""
    with contextlib.ExitStack() as stack:
        if request.param == "formula":
            stack.enter_context(formula_path())
        elif request.param == "operator":
            monkeypatch.setattr(
                linear, "dispatch", lambda call, tensors, _: operators.run(call, tensors)
            )
        elif request.param == "steps":  # of devices that have no kernel
            whole = chunks.plan
            monkeypatch.setattr(chunks, "plan", lambda call, x, c, _: whole(call, x, c, True))
            monkeypatch.setattr(chunks.kernel, "step", lambda *a, **_: chunks.steps.step(*a))
            monkeypatch.setattr(chunks.kernel, "distill", lambda *a, **_: chunks.steps.distill(*a))
        yield request.param


def tensors_of(results: Any) -> Results:
    return [results] if isinstance(results, Tensor) else [*results]


# Labels and counts


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


def backward(problem: Problem, function: Callable[..., Any], settings: dict[str, Any]) -> Results:
    inputs = {k: t.clone().requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    loss = function(**inputs, **settings)
    learned = [inputs[k] for k in problem.learned]
    return [loss.detach(), *torch.autograd.grad(loss, learned, torch.ones_like(loss))]


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


# Tensors that are not what they seem


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "indices": linear_cross_entropy,
    "probabilities": linear_cross_entropy,
    "log_prob": linear_log_prob,
    "head": linear_kl_div,
    "logits": linear_kl_div,
}


def arguments(kind: str, generator: Generator) -> dict[str, Any]:
    problem = Distillation(generator, shape=(6, 4, 9))
    found: dict[str, Any] = dict(problem.tensors)
    if kind in ("indices", "probabilities"):
        found["weight"] = problem.normal(9).abs()
    if kind == "probabilities":
        found["target"] = problem.normal(6, 9).softmax(1)
    if kind == "head":
        found |= problem.teacher
    if kind == "logits":
        found["teacher_logits"] = problem.logits()
    if kind in ("head", "logits"):
        found["hard_weight"] = 1.0
    if kind != "log_prob":
        found["sample_weight"] = problem.normal(6)
        found["denominator"] = torch.tensor(3.0, dtype=torch.float64)
    return found


class Subclass(torch.Tensor):
    pass


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


SERVED: dict[str, Callable[[Tensor], Tensor]] = {
    "subclass": lambda t: t.as_subclass(Subclass),
    "lazy sign": lambda t: torch._neg_view(-t),
    "zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "freed": (freed, "the storage of {} was freed"),
    "sparse": (lambda t: t.to_sparse(), "{} has layout torch.sparse_coo"),
}


def outcome(kind: str, given: dict[str, Any]) -> Results:
    """Results and gradients; subclasses become plain."""
    learned = {k: given[k].clone() for k in ("input", "linear_weight", "linear_bias")}
    learned = {k: t.requires_grad_() for k, t in learned.items()}
    results = tensors_of(FUNCTIONS[kind](**given | learned))
    grads = torch.autograd.grad(results[0].sum(), [*learned.values()])
    return [t.detach().as_subclass(Tensor) for t in (*results, *grads)]


@pytest.mark.parametrize("how", SERVED)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_odd_tensors_are_served(kind: str, how: str, generator: Generator) -> None:
    given = arguments(kind, generator)
    for name in [k for k, t in given.items() if isinstance(t, Tensor)]:
        odd = SERVED[how](given[name])
        plain = torch.zeros_like(given[name]) if how == "zeros" else given[name]
        expected = outcome(kind, given | {name: plain})
        close(outcome(kind, given | {name: odd}), expected, equal_nan=True)


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


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_nobody_can_read_is_refused_by_name(kind: str, how: str, generator: Generator) -> None:
    given, function = arguments(kind, generator), FUNCTIONS[kind]
    make, words = REFUSED[how]
    for name in [k for k, t in given.items() if isinstance(t, Tensor)]:
        message = f"{function.__name__}: {words.format(name)}"
        with pytest.raises(RuntimeError, match=message):
            function(**given | {name: make(given[name])})


ARRIVING: dict[str, Callable[[Tensor], Tensor]] = {
    **{k: SERVED[k] for k in ("lazy sign", "zeros")},
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("how", ARRIVING)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_odd_gradients_that_arrive(how: str, reduction: str, generator: Generator) -> None:
    """Those of statistics, too."""
    problem = Distillation(generator, shape=(6, 4, 9))
    calls: list[Callable[..., Any]] = [
        lambda **t: linear_cross_entropy(**t, reduction=reduction),
        lambda **t: linear_kl_div(**t, **problem.teacher, reduction=reduction),
        lambda **t: linear_log_prob(**t, statistics=True)[:3],
    ]
    for call in calls:
        inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
        learned = [inputs[k] for k in problem.learned]
        for chosen in range(len(tensors_of(call(**inputs)))):
            results = tensors_of(call(**inputs))
            ones = [torch.ones_like(r) for r in results]
            odd = [*ones]
            odd[chosen] = ARRIVING[how](torch.full_like(ones[chosen], 2.0))
            same = [*ones]
            same[chosen] = torch.full_like(ones[chosen], 0.0 if how == "zeros" else 2.0)
            found = torch.autograd.grad(results, learned, odd, retain_graph=True)
            close([*found], [*torch.autograd.grad(results, learned, same)])
            if results[chosen].grad_fn.name() == "NegBackward0":
                continue  # PyTorch's own would read it first
            results = tensors_of(call(**inputs))
            odd[chosen] = freed(ones[chosen])
            with pytest.raises(RuntimeError, match="the storage of incoming was freed"):
                torch.autograd.grad(results, learned, odd)


def test_a_zero_that_autograd_made(generator: Generator) -> None:
    """`sgn()` sends one back: the gradient by it is 0."""
    problem = Problem(generator)
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    losses = linear_cross_entropy(**inputs, reduction="none")
    (losses.sgn() + losses).sum().backward()
    plain = Problem(generator)
    plain.tensors = problem.tensors
    expected = backward(plain, lambda **t: linear_cross_entropy(**t, reduction="sum"), {})
    close([inputs[k].grad for k in problem.learned], expected[1:])


DISTRIBUTED = """
import sys, torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

sys.path.insert(0, sys.argv[1])
from conftest import *
from test_heads import FUNCTIONS, arguments, outcome
from test_linear import close

dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))

for kind, function in FUNCTIONS.items():
    given = arguments(kind, torch.Generator().manual_seed(0))
    names = [k for k, t in given.items() if isinstance(t, torch.Tensor)]
    expected = outcome(kind, given)
    for name in names:
        close(outcome(kind, given | {name: AsyncCollectiveTensor(given[name])}), expected)
        mixed = given | {name: distribute_tensor(given[name], mesh, [Replicate()])}
        if name == "denominator":  # a number to DTensors as well
            continue
        try:
            function(**mixed)
        except RuntimeError as error:
            words = str(error)
            assert words.startswith(f"{function.__name__}: {name} is a DTensor, "), words
            assert "head.unshard()" in words and "full_tensor() alone" in words
        else:
            raise AssertionError(f"{kind}: {name} as a DTensor")
    spread = {k: distribute_tensor(given[k], mesh, [Replicate()]) for k in names}
    of_rows = ("target", "weight", "sample_weight", "denominator")
    for some in (spread, {k: t for k, t in spread.items() if k not in of_rows}):
        found = outcome(kind, given | some)
        close([t.full_tensor() if hasattr(t, "full_tensor") else t for t in found], expected)
print("all of them")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_tensors_of_torch_distributed(tmp_path: Path) -> None:
    """In a process of its own: those without a kernel once ended it."""
    command = [
        sys.executable,
        "-c",
        DISTRIBUTED,
        str(Path(__file__).parent.parent),
        str(tmp_path / "x"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0 and "all of them" in done.stdout, done.stderr[-3000:]


# Settings that learn


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
SETTINGS = [
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


@pytest.mark.parametrize(("function", "name"), SETTINGS)
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


def test_a_denominator_elsewhere_is_refused(generator: Generator) -> None:
    problem = Problem(generator)
    denominator = torch.tensor(3.0, device="meta")
    with pytest.raises(RuntimeError, match="denominator is on meta, input on cpu"):
        linear_cross_entropy(**problem.tensors, denominator=denominator)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_settings_that_learn_are_checked(value: float, generator: Generator) -> None:
    setting = torch.tensor(value, requires_grad=True)
    for function, name in SETTINGS[len(NUMBERS) :]:
        if name == "logit_scale" and value in (0.0, -1.0):
            continue
        with pytest.raises(ValueError, match=f"{function.__name__}: {name} must be finite"):
            with_setting(function, {name: setting}, generator)


# What is changed between loss and backward


def changed(problem: Problem, name: str, call: Callable[..., Any], compiled: bool) -> Results:
    """The gradients of all but `name`, which is frozen and changed after the loss was taken."""
    call = torch.compile(call, backend="aot_eager") if compiled else call
    inputs = {k: t.clone() for k, t in problem.tensors.items()}
    learned = [inputs[k].requires_grad_() for k in problem.learned if k != name]
    results = call(**inputs)
    inputs[name].data.mul_(1)  # an optimizer's way leaves the version
    with torch.no_grad():
        inputs[name].zero_()
    return [*torch.autograd.grad(results, learned)]


@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_tensors_changed_before_backward(compiled: bool, generator: Generator) -> None:
    """Where forward stored the gradients they may be."""
    problem = Distillation(generator)
    calls: list[Callable[..., Any]] = [
        linear_cross_entropy,
        lambda **t: linear_kl_div(**t, **problem.teacher),
    ]
    for call in calls[: 1 if compiled else 2]:
        for name in problem.tensors if not compiled else ("linear_weight",):
            expected = backward(problem, call, {})[1:]
            pairs = zip(problem.learned, expected, strict=True)
            found = changed(problem, name, call, compiled)
            close(found, [g for k, g in pairs if k != name])


def test_what_learns_changed_before_backward(generator: Generator) -> None:
    """Its gradient is there; what would be computed anew, with create_graph, is refused."""
    problem = Problem(generator)
    expected = backward(problem, linear_cross_entropy, {})[1:]
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    loss = linear_cross_entropy(**inputs)
    with torch.no_grad():
        inputs["input"].zero_()
    words = "linear_cross_entropy: input was changed after the loss was taken: .* create_graph"
    learned = [inputs[k] for k in problem.learned]
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(loss, learned, create_graph=True, retain_graph=True)
    close([*torch.autograd.grad(loss, learned, retain_graph=True)], expected)
    close([*torch.autograd.grad(loss, learned)], expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, learned)


@pytest.mark.parametrize("name", ["input", "linear_weight", "target", "sample_weight"])
def test_unreduced_losses_need_what_they_were_given(name: str, generator: Generator) -> None:
    problem = Problem(generator)
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    inputs["sample_weight"] = problem.rewards()
    losses = linear_cross_entropy(**inputs, reduction="none")
    with torch.no_grad():
        inputs[name].zero_()
    words = f"linear_cross_entropy: {name} was changed after the loss was taken: .*no gradient is"
    with pytest.raises(RuntimeError, match=words):
        losses.sum().backward()


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "target"])
def test_saved_tensors_of_another_size(name: str, generator: Generator) -> None:
    """Nothing is read out of bounds."""
    problem = Problem(generator)
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    for call in (linear_cross_entropy, linear_log_prob):
        inputs = {k: t.detach().requires_grad_(k in problem.learned) for k, t in inputs.items()}
        settings = {"reduction": "none"} if call is linear_cross_entropy else {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, shorter(inputs[name])):
            losses = call(**inputs, **settings)
        with pytest.raises(RuntimeError, match=f"{name} was saved for backward as"):
            losses.sum().backward()


def shorter(of: Tensor) -> Callable[[Tensor], Tensor]:
    """An unpack hook that gives one of the tensors with a row less."""
    same = (of.untyped_storage().data_ptr(), of.numel())
    return lambda t: t[:-1] if (t.untyped_storage().data_ptr(), t.numel()) == same else t


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_saved_tensors_in_other_forms(reduction: str, generator: Generator) -> None:
    """Of another type, elsewhere in memory, or a subclass; and what a hook kept stays as it is."""
    problem = Problem(generator)
    settings = {"reduction": reduction}
    expected = backward(problem, linear_cross_entropy, settings)
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.clone()))
        return tensor

    forms: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.as_subclass(Subclass) if t.is_floating_point() else t,
        lambda t: t if t.is_floating_point() else t.to(torch.int16),
    ]
    for form in forms:
        with torch.autograd.graph.saved_tensors_hooks(pack, form):
            inputs = {
                k: t.clone().requires_grad_(k in problem.learned)
                for k, t in problem.tensors.items()
            }
            loss = linear_cross_entropy(**inputs, **settings)
        grads = torch.autograd.grad(
            3 * loss, [inputs[k] for k in problem.learned], torch.ones_like(loss)
        )
        close([g / 3 for g in grads], expected[1:])
        assert kept and all(same_bits(t.detach(), copy.detach()) for t, copy in kept)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensors_of_inference_mode(reduction: str, generator: Generator) -> None:
    """A teacher's, and labels; and what is made within it is not differentiable."""
    problem = Distillation(generator)
    settings = {"reduction": reduction, "hard_weight": 0.5}
    expected = backward(problem, linear_kl_div, {**settings, "teacher_logits": problem.logits()})
    with torch.inference_mode():
        logits, target = problem.logits(), problem.tensors["target"].clone()
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    inputs |= {"target": target, "teacher_logits": logits}
    learned = [inputs[k] for k in problem.learned]
    loss = linear_kl_div(**inputs, **settings)
    ones = torch.ones_like(loss)
    if reduction == "mean":
        with pytest.raises(RuntimeError, match="target is of inference mode, and not kept"):
            torch.autograd.grad(loss, learned, ones, create_graph=True, retain_graph=True)
    with torch.inference_mode():
        logits.zero_()
    close([loss.detach(), *torch.autograd.grad(loss, learned, ones)], expected)
    with torch.inference_mode(), torch.enable_grad():
        assert not linear_kl_div(**inputs, **settings).requires_grad


def test_nodes_and_events_bear_the_name_of_the_loss(generator: Generator) -> None:
    problem = Distillation(generator)
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    calls: dict[str, Callable[..., Any]] = {
        "linear_cross_entropy": linear_cross_entropy,
        "linear_kl_div": lambda **t: linear_kl_div(**t, **problem.teacher),
        "linear_log_prob": lambda **t: linear_log_prob(**t, statistics=True).lse.sum(),
    }
    for name, call in calls.items():
        with torch.profiler.profile() as seen:
            loss = call(**inputs)
            loss.backward()
            with torch.no_grad():
                call(**inputs)
            with formula_path():
                call(**inputs)
        events = [e.key for e in seen.key_averages() for _ in range(e.count)]
        assert events.count(f"fusedloss::{name}") == 3
        assert any(f"fusedloss::{name}Backward" in e for e in events)


# Autocast, devices, shapes


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_leaves_float64_alone(reduction: str, generator: Generator) -> None:
    problem = Distillation(generator)
    settings = {"reduction": reduction}
    calls: list[Callable[..., Any]] = [
        lambda **t: linear_cross_entropy(**t, **settings),
        lambda **t: linear_kl_div(**t, **problem.teacher, **settings),
        linear_log_prob,
    ]
    for call, name in itertools.product(calls, ("chunks", "formula")):
        with formula_path() if name == "formula" else contextlib.nullcontext():
            expected = problem.run(call)
            with torch.autocast("cpu", torch.bfloat16):
                found = problem.run(call)
        assert all(t.dtype is torch.float64 for t in found)
        close(found, expected, rtol=1e-12, atol=1e-12)
    problem.tensors["linear_weight"] = problem.tensors["linear_weight"].float()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="same dtype"):
        calls[0](**problem.tensors)


def test_heads_on_meta_tensors(generator: Generator) -> None:
    """Shapes and types, and gradients of them."""
    problem = Distillation(generator)
    problem.tensors = {k: t.to("meta") for k, t in problem.tensors.items()}
    teacher = {k: t.to("meta") for k, t in problem.teacher.items()}
    weight = torch.ones(problem.c, dtype=torch.float64, device="meta")
    rewards = torch.ones(problem.n, dtype=torch.float64, device="meta")
    number = torch.tensor(2.0, dtype=torch.float64, device="meta")
    calls: list[Callable[..., Any]] = [
        lambda **t: linear_cross_entropy(**t, weight=weight, z_loss=0.1, softcap=2.0),
        lambda **t: linear_cross_entropy(**t, sample_weight=rewards, denominator=3.0),
        lambda **t: linear_cross_entropy(**t, reduction="none", label_smoothing=0.1),
        lambda **t: linear_log_prob(**t, statistics=True, temperature=0.5),
        lambda **t: linear_kl_div(**t, **teacher, hard_weight=0.5),
        lambda **t: linear_cross_entropy(**t, softcap=number, logit_scale=number),
        lambda **t: linear_log_prob(**t, temperature=number),
        lambda **t: linear_kl_div(**t, **teacher, temperature=number, softcap=number),
    ]
    for call in calls:
        inputs = {
            k: t.detach().requires_grad_(k in problem.learned) for k, t in problem.tensors.items()
        }
        results = tensors_of(call(**inputs))
        assert all(r.is_meta and r.shape in ((), (problem.n,)) for r in results)
        grads = torch.autograd.grad(results[0].sum(), [inputs[k] for k in problem.learned])
        assert all(g.is_meta for g in grads)


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


@pytest.mark.parametrize("out", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("batch", [(), (3, 4)], ids=str)
def test_unreduced_losses_are_contiguous(
    batch: tuple[int, ...], out: tuple[int, ...], path: str, generator: Generator
) -> None:
    problem = Problem(generator, out=out, shape=(12, 4, 5))
    shapes = {"input": (*(batch or (12,)), 4), "target": (*(batch or (12,)), *out)}
    for name, shape in shapes.items():
        problem.tensors[name] = problem.tensors[name].reshape(shape)
    losses = linear_cross_entropy(**problem.tensors, reduction="none")
    found = [losses, *linear_log_prob(**problem.tensors, statistics=True)[:4]]
    assert all(t.shape == shapes["target"] and t.is_contiguous() for t in found)
    losses.view(-1)


# Threads


def with_threads(compute: Callable[[], Results]) -> list[Results]:
    before = torch.get_num_threads()
    try:
        return [(torch.set_num_threads(n), compute())[1] for n in (1, 2)]
    finally:
        torch.set_num_threads(before)


def assert_same_bits(found: list[Results]) -> None:
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=name_of)
@pytest.mark.parametrize(("setting", "reduction"), [("plain", "none"), ("all", "mean")])
def test_threads_change_nothing_but_matrix_products(
    dtype: torch.dtype, setting: str, reduction: str, generator: Generator
) -> None:
    """Here the products are of one term each, and the same in whatever order they are summed."""
    size = 256
    problem = Distillation(generator, dtype, shape=(size, size, size))
    for name in ("input", "linear_weight"):
        order = torch.randperm(size, generator=generator)
        problem.tensors[name] = torch.eye(size, dtype=dtype)[order] * 2
    settings = {**problem.settings(setting), "reduction": reduction}
    logits = {"teacher_logits": problem.normal(size, size)}
    calls: list[Callable[..., Any]] = [
        lambda **t: linear_cross_entropy(**t, **settings),
        lambda **t: linear_kl_div(**t, **logits, hard_weight=0.5, reduction=reduction),
        lambda **t: linear_log_prob(**t, statistics=setting == "all"),
    ]
    for call in calls:
        assert_same_bits(with_threads(lambda call=call: problem.run(call)))  # type: ignore[misc]


def test_threads_share_no_sum_over_rows(generator: Generator) -> None:
    """torch's own sum of so many depends on how many threads share it."""
    problem = Problem(generator, shape=(70_001, 1, 3))
    settings = {"weight": problem.normal(3).abs(), "sample_weight": problem.rewards()}
    for reduction in ("sum", "mean"):
        assert_same_bits(
            with_threads(
                lambda r=reduction: [  # type: ignore[misc]
                    linear_cross_entropy(**problem.tensors, **settings, reduction=r)
                ]
            )
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=name_of)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, generator: Generator) -> None:
    """But for its products, which are of one term here."""
    problem = Distillation(generator, dtype, shape=(67, 67, 67))
    problem.tensors["input"] = torch.eye(67, dtype=dtype)[torch.randperm(67, generator=generator)]
    problem.tensors["linear_weight"] = torch.eye(67, dtype=dtype) / 4
    given: dict[str, Any] = {**problem.tensors, "teacher_logits": problem.normal(67, 67)}

    def losses(rows: slice) -> Results:
        each = {k: t[rows] if k in of_rows else t for k, t in given.items()}
        teacher = each.pop("teacher_logits")
        found = [linear_cross_entropy(**each, reduction="none", label_smoothing=0.1, softcap=3.0)]
        found.append(linear_kl_div(**each, teacher_logits=teacher, reduction="none"))
        return [*found, *linear_log_prob(**each, statistics=True)[:4]]

    of_rows = ("input", "target", "teacher_logits")
    whole = losses(slice(None))
    for rows in (slice(0, 1), slice(33, 34), slice(5, 44), slice(1, None, 3)):
        assert all(same_bits(a, b[rows]) for a, b in zip(losses(rows), whole, strict=True))
