"""Heads to test with, and their definitions by PyTorch; fixtures of the ways to compute them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import formula_path, same_bits
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812

from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob
from fusedloss.autograd import operators
from fusedloss.engines.chunks import chunked, plan, shards, straight
from fusedloss.route import heads

N, D, C = 37, 19, 53


SMALL = 12000  # bytes: chunks of about 13 rows in float64


Tensors = dict[str, Tensor]


class Problem:
    """Random tensors for a head, by the names of the arguments."""

    def __init__(
        self,
        generator: Generator,
        dtype: torch.dtype = torch.float64,
        out: tuple[int, ...] = (),
        probabilities: bool = False,
        shape: tuple[int, int, int] = (N, D, C),
    ) -> None:
        self.generator, self.dtype, self.out = generator, dtype, out
        n, d, c = shape
        self.n, self.c = n, c
        self.tensors = {
            "input": self.normal(n, d),
            "linear_weight": self.normal(c, *out, d) / d**0.5,
            "linear_bias": self.normal(c, *out),
        }
        if probabilities:
            self.tensors["target"] = self.normal(n, c, *out).softmax(1)
        else:
            target = torch.randint(c, (n, *out), generator=generator)
            target.view(-1)[::5] = -100
            self.tensors["target"] = target
        self.learned = [k for k, t in self.tensors.items() if t.is_floating_point()]

    def normal(self, *shape: int) -> Tensor:
        values = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return values.to(self.dtype)

    def settings(self, name: str) -> dict[str, Any]:
        positive = self.normal(self.c).abs() + 0.1
        return {
            "plain": {},
            "weight": {"weight": positive},
            "label_smoothing": {"label_smoothing": 0.2},
            "z_loss": {"z_loss": 0.01},
            "softcap": {"softcap": 2.0},
            "logit_scale": {"logit_scale": -0.5},
            "sample_weight": {"sample_weight": self.rewards()},
            "all": {
                "weight": positive,
                "label_smoothing": 0.2,
                "z_loss": 0.01,
                "softcap": 2.0,
                "logit_scale": 1.5,
                "sample_weight": self.rewards(),
            },
        }[name]

    def rewards(self) -> Tensor:
        """Of both signs, and 0 for some rows."""
        rewards = self.normal(self.n, *self.out)
        return torch.where(rewards.abs() < 0.3, 0, rewards)

    def run(self, function: Callable[..., Any], **kwargs: Any) -> list[Tensor]:
        """The results, and the gradients of `learned`; whatever was given stays as it is."""
        inputs = {
            k: t.detach().clone().requires_grad_(k in self.learned) for k, t in self.tensors.items()
        }
        given = [*inputs.values(), *(v for v in kwargs.values() if isinstance(v, Tensor))]
        before = [t.detach().clone() for t in given]
        results = function(**inputs, **kwargs)
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        generator = torch.Generator().manual_seed(1)
        differentiable = [r for r in results if r.requires_grad]
        incoming = [torch.randn(r.shape, generator=generator).to(r) for r in differentiable]
        grads = torch.autograd.grad(differentiable, [inputs[k] for k in self.learned], incoming)
        for tensor, copy in zip(given, before, strict=True):
            assert same_bits(tensor.detach(), copy), "an argument was written to"
        return [*(r.detach() for r in results), *grads]


SETTINGS = (
    "plain",
    "weight",
    "label_smoothing",
    "z_loss",
    "softcap",
    "logit_scale",
    "sample_weight",
    "all",
)


REDUCTIONS = ("none", "mean", "sum")


each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def close(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def torch_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row step of devices that have no kernel."""

    without_kernels(monkeypatch)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices that have none."""
    for module in (chunked, plan, shards, straight):
        monkeypatch.setattr(module, "on_host", lambda _: False)


WIDE = (6, 5, 2500)  # more classes than a block of the kernels


STRETCHES = 30_000  # bytes: without gradients, 64 of these classes at a time


def rising(problem: Problem) -> Problem:
    """With the greatest logit late: what was gathered relative to an earlier one is brought to it."""
    problem.tensors["linear_bias"] += torch.linspace(0, 5, problem.c)
    return problem


def exact(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    **kwargs: Any,
) -> Tensor:
    """The definition, by PyTorch's cross entropy."""
    x = logit_scale * F.linear(input, linear_weight, linear_bias)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    counted = target != -100
    losses = F.cross_entropy(x, target, reduction="none", **kwargs)
    losses = losses + z_loss * x.logsumexp(1).square() * counted
    losses = losses if sample_weight is None else losses * sample_weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    weight = kwargs.get("weight")
    return losses.sum() / (counted.sum() if weight is None else weight[target[counted]].sum())


def double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def error(found: Tensor, true: Tensor) -> Tensor:
    return (found.double() - true).square().mean().sqrt()


def leaves(problem: Problem) -> list[Tensor]:
    return [t.requires_grad_() for k, t in problem.tensors.items() if k in problem.learned]


def plain_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    statistics: bool = True,
) -> tuple[Tensor, ...]:
    x = F.linear(input, linear_weight, linear_bias)
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    counted, log_p = target != -100, x.log_softmax(1)
    index = target.clamp(min=0)
    entropy = -(log_p.exp() * log_p).sum(1)
    correct = (x.argmax(1) == index) & counted
    own = log_p.gather(1, index[:, None])[:, 0]
    found = (own, x.logsumexp(1), entropy)
    of_rows = tuple(torch.where(counted, t, 0) for t in found)
    return (*of_rows, correct, counted.sum()) if statistics else of_rows[:1]


class Distillation(Problem):
    """A student and a teacher; both give some classes no probability at all."""

    def __init__(
        self,
        generator: Generator,
        dtype: torch.dtype = torch.float64,
        shape: tuple[int, int, int] = (N, D, C),
    ) -> None:
        super().__init__(generator, dtype, shape=shape)
        self.teacher = {
            "teacher_input": self.normal(self.n, 7),
            "teacher_weight": self.normal(self.c, 7),
            "teacher_bias": self.normal(self.c),
        }

    def logits(self) -> Tensor:
        return F.linear(*self.teacher.values())


def plain_divergence(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    target: Tensor | None = None,
    *,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    softcap: float | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    x = F.linear(input, linear_weight, linear_bias)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    s, t = (x / temperature).log_softmax(1), (teacher_logits / temperature).log_softmax(1)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    soft = {
        "forward": lambda: F.kl_div(s, t, reduction="none", log_target=True).sum(1),
        "reverse": lambda: F.kl_div(t, s, reduction="none", log_target=True).sum(1),
        "js": lambda: (
            beta * F.kl_div(m, t, reduction="none", log_target=True)
            + (1 - beta) * F.kl_div(m, s, reduction="none", log_target=True)
        ).sum(1),
    }[divergence]()
    losses = soft_weight * soft
    if target is not None:
        losses = losses + hard_weight * F.cross_entropy(x, target, reduction="none")
        losses = torch.where(target == -100, 0, losses)
    losses = losses if sample_weight is None else losses * sample_weight
    count = input.shape[0] if target is None else (target != -100).sum()
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / count}[reduction]


each_divergence = pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])


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
                heads, "results", lambda call, tensors, *_: operators.run(call, tensors)
            )
        elif request.param == "steps":  # of devices that have no kernel
            without_kernels(monkeypatch)
        yield request.param


def tensors_of(results: Any) -> Results:
    return [results] if isinstance(results, Tensor) else [*results]


def backward(problem: Problem, function: Callable[..., Any], settings: dict[str, Any]) -> Results:
    inputs = {k: t.clone().requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    loss = function(**inputs, **settings)
    learned = [inputs[k] for k in problem.learned]
    return [loss.detach(), *torch.autograd.grad(loss, learned, torch.ones_like(loss))]


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


def outcome(kind: str, given: dict[str, Any]) -> Results:
    """Results and gradients; subclasses become plain."""
    learned = {k: given[k].clone() for k in ("input", "linear_weight", "linear_bias")}
    learned = {k: t.requires_grad_() for k, t in learned.items()}
    results = tensors_of(FUNCTIONS[kind](**given | learned))
    grads = torch.autograd.grad(results[0].sum(), [*learned.values()])
    return [t.detach().as_subclass(Tensor) for t in (*results, *grads)]
