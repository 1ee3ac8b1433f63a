"""A head like an earlier one runs straight: no check, the same bits, and nothing kept that a tensor holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import FLOATS, name_of, same_bits, tells_what_changed
from problems import Distillation, Problem, Results, close, each_reduction, leaves
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob
from fusedloss.core import trace
from fusedloss.engines.chunks import products
from fusedloss.route import heads, memo

Call = Callable[..., Tensor]
SHAPE = (7, 6, 9)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, no call may be checked."""
    return lambda: monkeypatch.setattr(heads, "results", lambda *_: pytest.fail("it was checked"))


def calls(problem: Distillation) -> Iterator[tuple[str, Call]]:
    own = problem.settings("all")
    for name in ("plain", "weight", "label_smoothing", "z_loss", "softcap", "logit_scale", "all"):
        settings = own if name == "all" else {k: v for k, v in own.items() if k == name}
        for reduction in ("none", "mean", "sum"):
            yield f"{name} {reduction}", bind(linear_cross_entropy, reduction=reduction, **settings)
    yield "log_prob", bind(linear_log_prob, temperature=0.7, softcap=3.0)
    for divergence in ("forward", "reverse", "js"):
        settings = {"divergence": divergence, "hard_weight": 0.4}
        yield divergence, bind(linear_kl_div, **settings, **problem.teacher)
        logits = {"teacher_logits": problem.logits(), "reduction": "none"}
        yield f"{divergence} of logits", bind(linear_kl_div, **settings, **logits)


def bind(function: Call, **settings: Any) -> Call:
    return lambda **tensors: function(**tensors, **settings)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("native", [False, True])
def test_the_second_call_has_the_bits_of_the_first(
    dtype: torch.dtype,
    native: bool,
    generator: Generator,
    unchecked: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: native)
    problem = Distillation(generator, dtype, shape=SHAPE)
    named = dict(calls(problem))
    first = {name: problem.run(call) for name, call in named.items()}
    before = trace.calls()
    unchecked()
    for name, call in named.items():
        found = problem.run(call)
        assert all(same_bits(a, b) for a, b in zip(found, first[name], strict=True)), name
    assert sum((trace.calls() - before).values()) == len(named)


@each_reduction
@pytest.mark.parametrize("name", ["input", "linear_weight", "target", "sample_weight"])
def test_what_does_not_lie_flat_is_read_where_it_lies(
    name: str, reduction: str, generator: Generator
) -> None:
    """As `labels[:, 1:]` does not, each time."""
    problem = Problem(generator, shape=(8, 6, 9))
    given = {**problem.tensors, "sample_weight": problem.rewards()}
    for of_rows in ("input", "target", "sample_weight"):
        given[of_rows] = given[of_rows].unflatten(0, (2, 4))
    first = linear_cross_entropy(**given, reduction=reduction)
    given[name] = torch.cat([given[name][:, :1], given[name]], 1)[:, 1:]
    for _ in range(3):
        close([linear_cross_entropy(**given, reduction=reduction)], [first])


@each_reduction
def test_what_is_wanted_makes_another_call(reduction: str, generator: Generator) -> None:
    problem = Problem(generator, shape=SHAPE)
    call = bind(linear_cross_entropy, reduction=reduction)
    names = [*problem.learned]
    whole = problem.run(call)
    for _ in range(2):
        for k, name in enumerate(names):
            problem.learned = [name]
            close(problem.run(call), [whole[0], whole[1 + k]])
        with torch.no_grad():
            close([call(**problem.tensors)], whole[:1])


def test_values_are_looked_at_each_time(generator: Generator) -> None:
    """Rows that are ignored, weights, and what is out of range."""
    problem = Problem(generator, shape=SHAPE)
    given = {"weight": problem.normal(9).abs(), "sample_weight": problem.rewards()}
    for factor in (1.0, 2.0, 0.0):
        for name in ("weight", "sample_weight"):
            given[name].mul_(factor)
        problem.tensors["linear_weight"].add_(0.1)
        problem.tensors["target"].fill_(3)[: int(factor)] = -100
        found = problem.run(linear_cross_entropy, **given)
        memo.known.clear()
        expected = problem.run(linear_cross_entropy, **given)
        close(found, expected, equal_nan=True, rtol=0, atol=0)  # type: ignore[arg-type]
    problem.tensors["target"][2] = 9
    with pytest.raises(IndexError, match=r"target\[2\] = 9 is out of range for 9 classes"):
        linear_cross_entropy(**problem.tensors, **given)
    problem.tensors["target"][2] = 0
    problem.tensors["linear_weight"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage of linear_weight was freed"):
        linear_cross_entropy(**problem.tensors, **given)


def test_rows_that_do_not_count_take_part_in_no_product(generator: Generator) -> None:
    problem = Problem(generator, shape=SHAPE)
    for _ in range(2):
        problem.tensors["input"][problem.tensors["target"] == -100] = torch.nan
        for reduction in ("mean", "none"):
            found = problem.run(bind(linear_cross_entropy, reduction=reduction))
            assert all(t.isfinite().all() for t in found)
    problem.tensors["target"].fill_(-100)
    loss, *grads = problem.run(linear_cross_entropy)
    assert loss.isnan() and not any(g.any() for g in grads)


@pytest.mark.parametrize("name", ["plain mean", "all none", "log_prob", "js", "js of logits"])
def test_every_derivative(name: str, generator: Generator) -> None:
    problem = Distillation(generator, shape=(4, 3, 5))
    call = dict(calls(problem))[name]
    inputs = leaves(problem)

    def run(*tensors: Tensor) -> Tensor:
        return call(**{**problem.tensors, **dict(zip(problem.learned, tensors, strict=True))})

    for _ in range(2):
        torch.autograd.gradcheck(run, inputs, fast_mode=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    value = run(*inputs)
    one = torch.ones_like(value)
    first, second = (
        torch.autograd.grad(value, inputs, one, retain_graph=keep) for keep in (True, False)
    )
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    again = torch.func.grad(lambda x: run(x, *inputs[1:]).sum())(inputs[0].detach())
    torch.testing.assert_close(again, first[0])


@tells_what_changed
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_changed_before_backward(reduction: str, generator: Generator) -> None:
    problem = Problem(generator, shape=SHAPE)
    call = bind(linear_cross_entropy, reduction=reduction)
    expected = problem.run(call)[1:]
    inputs = {k: t.requires_grad_(k in problem.learned) for k, t in problem.tensors.items()}
    learned = [inputs[k] for k in problem.learned]
    for graph in (True, False):
        loss = call(**inputs)
        one = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
        with torch.no_grad():
            inputs["input"].add_(0)
        if graph or reduction == "none":
            with pytest.raises(RuntimeError, match="input was changed after the loss was taken"):
                torch.autograd.grad(loss, learned, one, create_graph=graph)
        else:
            close([*torch.autograd.grad(loss, learned, one)], expected)


@each_reduction
def test_under_hooks_checkpoints_and_autocast(reduction: str, generator: Generator) -> None:
    problem = Problem(generator, torch.float32, shape=SHAPE)
    call = bind(linear_cross_entropy, reduction=reduction)
    expected = problem.run(call)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        close(problem.run(call), expected)
    assert packed

    def again(**tensors: Tensor) -> Tensor:
        found: Tensor = checkpoint(lambda: call(**tensors), use_reentrant=False)
        return found

    close(problem.run(again), expected)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = problem.run(call)
        close(found, expected, rtol=0.05, atol=0.05)
        close(problem.run(call), expected)


def test_compiled_autograd_of_a_known_call(generator: Generator) -> None:
    problem = Distillation(generator, shape=SHAPE)
    for name in ("plain mean", "all none", "log_prob", "js of logits"):
        call = dict(calls(problem))[name]

        def step(call: Call = call) -> Results:
            inputs = {
                k: t.clone().requires_grad_(k in problem.learned)
                for k, t in problem.tensors.items()
            }
            call(**inputs).sum().backward()
            return [inputs[k].grad for k in problem.learned]  # type: ignore[misc]

        expected = step()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            close(step(), expected)


def test_many_shapes_leave_little(generator: Generator) -> None:
    for n in range(1, 40):
        linear_cross_entropy(torch.zeros(n, 2), torch.zeros(3, 2), torch.zeros(n, dtype=torch.long))
    assert len(memo.known) <= memo.MOST


def test_what_lacks_is_named_where_other_tensors_are_there(generator: Generator) -> None:
    given = Problem(generator, shape=SHAPE).tensors
    assert "linear_bias" in given
    for _ in range(2):
        linear_cross_entropy(**given)
    with pytest.raises(TypeError, match="argument 'target' must be Tensor"):
        linear_cross_entropy(**{**given, "target": None})


@each_reduction
def test_a_teacher_is_a_constant_to_every_derivative(reduction: str, generator: Generator) -> None:
    problem = Distillation(generator, shape=SHAPE)
    teacher = {name: t.clone().requires_grad_() for name, t in problem.teacher.items()}
    x = problem.tensors["input"].clone().requires_grad_()
    for _ in range(3):
        given = {**problem.tensors, "input": x, **teacher, "reduction": reduction}
        (first,) = torch.autograd.grad(linear_kl_div(**given).sum(), x, create_graph=True)
        found = torch.autograd.grad(first.square().sum(), [*teacher.values()], allow_unused=True)
        assert found == (None,) * len(teacher)


@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias", "target"])
@pytest.mark.parametrize("how", ["type", "strides"])
def test_what_another_type_or_layout_was_assigned_to_is_not_read_as_it_was(
    how: str, name: str, generator: Generator
) -> None:
    """By `.data`, as `module.half()` does: autograd does not see it, and the kernel would read too far."""
    problem = Problem(generator, torch.float32, shape=SHAPE)

    def step(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        own = {
            k: t.clone().requires_grad_(k in problem.learned) for k, t in problem.tensors.items()
        }
        given = {k: t.clone() for k, t in own.items()}
        loss = linear_cross_entropy(**given, reduction="none")
        given[name].data = change(given[name].data)
        return [loss, *torch.autograd.grad(loss.sum(), [own[k] for k in problem.learned])]

    def changed(own: Tensor) -> Tensor:
        if how == "strides":
            return own.repeat_interleave(2, -1)[..., ::2]
        return own.to(torch.float64 if own.is_floating_point() else torch.int32)

    expected = step(lambda own: own)
    for _ in range(3):
        close(step(changed), expected)
