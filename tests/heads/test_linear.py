"""Losses of a linear head: the loop over chunks against the formula, float64 and PyTorch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HALVES, formula_path, name_of, same_bits
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812

import fusedloss
from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob
from fusedloss.core import trace
from fusedloss.engines.chunks import loop as chunks
from fusedloss.engines.chunks import products

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

    def step(*args: Any, **of_kernels: Any) -> None:
        chunks.steps.step(*args)

    whole = chunks.plan
    monkeypatch.setattr(chunks, "plan", lambda call, x, c, _: whole(call, x, c, True))
    monkeypatch.setattr(chunks.kernel, "step", step)


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


WIDE = (6, 5, 2500)  # more classes than a block of the kernels
STRETCHES = 30_000  # bytes: without gradients, 64 of these classes at a time


def rising(problem: Problem) -> Problem:
    """With the greatest logit late: what was gathered relative to an earlier one is brought to it."""
    problem.tensors["linear_bias"] += torch.linspace(0, 5, problem.c)
    return problem


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


@pytest.mark.parametrize("setting", SETTINGS)
@each_reduction
def test_definition(setting: str, reduction: str, generator: Generator) -> None:
    problem = Problem(generator)
    settings = {**problem.settings(setting), "reduction": reduction}
    close(problem.run(linear_cross_entropy, **settings), problem.run(exact, **settings))


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
    wide.tensors = {k: _double(t) for k, t in problem.tensors.items()}
    true = wide.run(exact, **{k: _double(v) for k, v in settings.items()})
    for ours, theirs, truth in zip(found, eager, true, strict=True):
        assert ours.dtype == dtype
        rounding = torch.finfo(dtype).eps / 4 * truth.abs().max()
        assert _error(ours, truth) <= 1.1 * _error(theirs, truth) + rounding


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _error(found: Tensor, true: Tensor) -> Tensor:
    return (found.double() - true).square().mean().sqrt()


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
    wide.tensors = {k: _double(t) for k, t in problem.tensors.items()}
    wide.learned = problem.learned
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    *_, true = wide.run(F.linear_cross_entropy)
    *_, theirs = problem.run(F.linear_cross_entropy, options=options)
    *_, ours = problem.run(linear_cross_entropy, options=options)
    assert _error(ours, true) <= bound * _error(theirs, true)


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


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (33, 64, 1000)])
def test_bfloat16_products_lose_no_digits_of_the_logits(
    biased: bool, shape: tuple[int, int, int], generator: Generator
) -> None:
    n, d, c = shape
    x, weight, bias = (
        torch.randn(s, generator=generator).bfloat16() for s in ((n, d), (c, d), (c,))
    )
    bias = 30 * bias if biased else None
    high, low = torch.empty(2, n, c, dtype=torch.bfloat16)
    products.Split(weight, bias).logits(x, high, low)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(
        high.double() + low.double(), exact, rtol=2**-15, atol=2**-16 * exact.abs().max().item()
    )


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
    for wanted in itertools.chain.from_iterable(
        itertools.combinations(range(3), size) for size in (1, 2)
    ):
        problem.learned = [names[k] for k in wanted]
        calls.clear()
        close(problem.run(linear_cross_entropy), [whole[0], *(whole[1 + k] for k in wanted)])
        assert set(calls) == {
            f"grad_{name.removeprefix('linear_')}" for name in problem.learned
        } - {"grad_bias"}


def leaves(problem: Problem) -> list[Tensor]:
    return [t.requires_grad_() for k, t in problem.tensors.items() if k in problem.learned]


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


def test_vmap(generator: Generator) -> None:
    input = torch.randn(3, 5, D, generator=generator)
    weight = torch.randn(C, D, generator=generator)
    target = torch.randint(C, (3, 5), generator=generator)
    mapped = torch.func.vmap(linear_cross_entropy, (0, None, 0))(input, weight, target)
    each = [linear_cross_entropy(x, weight, t) for x, t in zip(input, target, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each))


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


def test_checkpoint(generator: Generator) -> None:
    problem = Problem(generator)

    def loss(**tensors: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            linear_cross_entropy, use_reentrant=False, **tensors
        )

    close(problem.run(loss), problem.run(linear_cross_entropy))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str, generator: Generator) -> None:
    problem = Problem(generator, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.run(linear_cross_entropy, reduction=reduction)
        eager = problem.run(exact, reduction=reduction)
    assert [t.dtype for t in found] == [t.dtype for t in eager]
    close(found, eager, rtol=0.05, atol=0.05)


def test_the_result_of_float16_scales_before_it_rounds(generator: Generator) -> None:
    """Its gradients would be 0 if they were stored in it before a loss scaler's factor."""
    problem = Problem(generator, torch.float16)
    inputs = leaves(problem)
    loss = linear_cross_entropy(**problem.tensors, denominator=2.0**30)
    (grad,) = torch.autograd.grad(loss, inputs[:1], torch.tensor(2.0**15, dtype=torch.float16))
    assert grad.dtype is torch.float16 and grad.any()


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


def test_options(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("an older torch")
    seen: list[int] = []
    step = chunks.kernel.step

    def counted(call: Any, logits: Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append(logits.shape[0])
        step(call, logits, *args, **kwargs)

    monkeypatch.setattr(chunks.kernel, "step", counted)
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


def test_log_prob_is_never_of_a_half_type(generator: Generator) -> None:
    problem = Problem(generator, torch.bfloat16)
    assert linear_log_prob(**problem.tensors).dtype is torch.float32


def test_log_prob_of_bad_input() -> None:
    problem = Problem(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="linear_log_prob: temperature must be finite and greater"):
        linear_log_prob(**problem.tensors, temperature=0.0)
    with pytest.raises(RuntimeError, match="linear_log_prob: target holds probabilities"):
        linear_log_prob(**{**problem.tensors, "target": torch.zeros(N, C)})


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


DISTILL: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "hard": {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.4},
    "softcap": {"softcap": 1.5, "temperature": 0.5, "hard_weight": 0.1},
}
each_divergence = pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])


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
    monkeypatch.setattr(
        chunks.kernel, "distill", lambda *args, **of_kernels: chunks.steps.distill(*args)
    )
    close(problem.run(linear_kl_div, **settings, memory_budget=SMALL), expected)


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
    wide.tensors = {k: _double(t) for k, t in problem.tensors.items()}
    wide.teacher = {k: _double(t) for k, t in problem.teacher.items()}
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
