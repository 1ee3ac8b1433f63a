"""A call like an earlier one skips the checks that saw no more than types, shapes and settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import (
    Case,
    assert_same_bits,
    draw_incoming,
    each_dtype,
    formula_path,
    leaves,
    parameters_reduced,
    run,
    same_bits,
    tells_what_changed,
)
from torch import Generator, Tensor, tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import functional
from fusedloss.core import trace
from fusedloss.engines import abi, cpu
from fusedloss.engines.cpu import engine as cpu_engine
from fusedloss.front.definition import REGISTRY, Loss
from fusedloss.route import dispatch, memo

BY_KERNEL = [
    loss
    for loss in REGISTRY.values()
    if loss.kind not in ("heads", "sequences")  # of which lengths are read at each call
    and loss.name != "triplet_margin_with_distance_loss"
]
each_loss = pytest.mark.parametrize("loss", BY_KERNEL, ids=lambda loss: loss.key)
BCE, CE, KL = "binary_cross_entropy", "cross_entropy", "kl_div"


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    memo.known.clear()
    yield
    memo.known.clear()


def options(loss: Loss) -> dict[str, object]:
    return {"log_target": {"log_target": True}, "marked": {"ignore_index": -1}}.get(
        loss.variant, {}
    )


@each_loss
def test_no_check_runs_again(
    loss: Loss, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = loss.example((3, 5), torch.float32, generator)
    leaf = tensors[0].clone().requires_grad_()
    loss.function(leaf, *tensors[1:], **options(loss), reduction="sum")
    first = loss.function(*tensors, **options(loss), reduction="sum")
    monkeypatch.setattr(
        dispatch, "formula_reason", lambda *_, **__: pytest.fail("it was checked again")
    )
    before = trace.calls()[loss.name, "kernel"]
    assert same_bits(loss.function(*tensors, **options(loss), reduction="sum"), first)
    assert trace.calls()[loss.name, "kernel"] == before + 1
    loss.function(leaf, *tensors[1:], **options(loss), reduction="sum").backward()
    assert leaf.grad is not None


LINEAR = (
    *("nll_loss", "kl_div", "multi_margin_loss", "multilabel_margin_loss"),
    *("hinge_embedding_loss", "margin_ranking_loss"),
)


def wants(case: Case) -> list[tuple[int, ...]]:
    """Which tensors may require a gradient: none, the first ones, the last one."""
    count = len(case.loss.differentiable)
    return [*(tuple(range(n)) for n in range(count + 1)), (case.loss.differentiable[-1],)]


@parameters_reduced(lambda case: case.loss in BY_KERNEL)
def test_the_bits_of_a_call_do_not_depend_on_earlier_ones(
    case: Case, reduction: str, generator: Generator
) -> None:
    """The arguments that are kept hold nothing of the first call's values and memory."""
    halves = ((3, 5), torch.bfloat16), ((3, 5), torch.float16)
    for shape, dtype in (((3, 5), torch.float32), ((4, 6, 3, 2), torch.float64), *halves):
        shape = shape[: case.loss.dims]
        earlier, _ = case.example(shape, dtype, generator)
        tensors, settings = case.example(shape, dtype, generator)
        settings = {**settings, "reduction": reduction}
        for wanted in wants(case):
            drawn = draw_incoming(case.loss.function(*tensors, **settings), generator)
            for incoming in (None, drawn):
                memo.known.clear()
                expected = run(case.loss.function, tensors, settings, wanted, incoming)
                run(case.loss.function, earlier, settings, wanted, incoming)
                again = run(case.loss.function, tensors, settings, wanted, incoming)
                assert_same_bits(again, expected)


@each_loss
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_strides_make_another_call(loss: Loss, moved: int, generator: Generator) -> None:
    tensors = loss.example((4, 6), torch.float32, generator)
    if moved >= len(tensors):
        return
    other = list(tensors)
    other[moved] = torch.stack((tensors[moved], 1 - tensors[moved]), -1)[..., 0]  # with gaps
    settings = {**options(loss), "reduction": "sum"}
    expected = run(loss.function, tuple(other), settings, (0,))
    memo.known.clear()
    for _ in range(2):
        run(loss.function, tensors, settings, (0,))
    assert_same_bits(run(loss.function, tuple(other), settings, (0,)), expected)


@each_dtype
def test_gradients_of_what_was_broadcast(dtype: torch.dtype, generator: Generator) -> None:
    x, target = torch.randn(4, 3).to(dtype), torch.rand(1, 3).to(dtype)
    anchor = torch.randn(1, 3).to(dtype)
    for function, tensors, count in (
        (functional.kl_div, (x, target), 2),
        (functional.triplet_margin_loss, (anchor, x, x.flip(0)), 3),
    ):
        first, *others = (
            run(function, tensors, {"reduction": "sum"}, tuple(range(count))) for _ in range(3)
        )
        assert [g.shape for g in first.grads] == [t.shape for t in tensors]
        for other in others:
            assert_same_bits(other, first)


@each_loss
@each_dtype
def test_a_known_call_packs_no_arguments(
    loss: Loss, dtype: torch.dtype, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = loss.example((3, 5), dtype, generator)
    count = 3 if loss.name == "triplet_margin_loss" else 1

    def step() -> tuple[Tensor, ...]:
        inputs = leaves(tensors, range(count))
        value = loss.function(*inputs, **options(loss), reduction="sum")
        return torch.autograd.grad(value, inputs[:count])

    expected = step()
    step()
    for engine in cpu.ENGINES.values():
        monkeypatch.setattr(engine, "pack", lambda *_: pytest.fail("they were packed anew"))
    for got, want in zip(step(), expected, strict=True):
        assert same_bits(got, want)


@each_loss
def test_every_derivative_of_a_known_call(loss: Loss, generator: Generator) -> None:
    tensors = loss.example((3, 5), torch.float64, generator)
    x = tensors[0].requires_grad_()

    def run(*inputs: Tensor) -> Tensor:
        return loss.function(*inputs, **options(loss), reduction="sum")

    for _ in range(3):
        value = run(x, *tensors[1:])
        (first,) = torch.autograd.grad(value, x, retain_graph=True)
        (second,) = torch.autograd.grad(value, x, create_graph=True)
        assert second.requires_grad or loss.name in LINEAR  # in x
        torch.testing.assert_close(first, second)
        (batched,) = torch.autograd.grad(value, x, torch.ones(2), is_grads_batched=True)
        assert same_bits(batched[1], first)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(value, x)
        torch.autograd.gradcheck(run, (x, *tensors[1:]))
        torch.autograd.gradgradcheck(run, (x, *tensors[1:]))


@tells_what_changed
@each_loss
def test_a_known_call_tells_what_was_changed(loss: Loss, generator: Generator) -> None:
    tensors = loss.example((3, 5), torch.float64, generator)
    x = tensors[0].requires_grad_()

    def run() -> Tensor:
        return loss.function(x, *tensors[1:], **options(loss), reduction="sum")

    for _ in range(3):
        torch.autograd.grad(run(), x, create_graph=True)
    value = run()
    expected = torch.autograd.grad(value, x, retain_graph=True)[0].clone()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match=f"{loss.name}: .* modified by an inplace operation"):
        torch.autograd.grad(value, x, create_graph=True)
    assert same_bits(torch.autograd.grad(value, x)[0], expected)


def test_a_kernel_without_memory_runs_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_engine, "repeater", lambda _: lambda *_: abi.NO_MEMORY)
    inputs = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for function in (functional.cross_entropy, functional.nll_loss):
        for reduction in ("mean", "none"):
            settings = {"reduction": reduction}
            expected = run(function, inputs, settings, (0,))
            for _ in range(2):
                assert_same_bits(run(function, inputs, settings, (0,)), expected)


def test_a_gradient_that_was_given_away_is_not_kept() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2])
    for _ in range(3):
        value = functional.cross_entropy(x, target)
        first, second = (
            torch.autograd.grad(value, x, torch.tensor(3.0), retain_graph=keep)[0]
            for keep in (True, False)
        )
        assert same_bits(first, second)
        first += 1
        assert not same_bits(first, second)


@pytest.mark.filterwarnings("ignore")  # of torch.jit.trace
@each_loss
def test_what_is_in_force_holds_for_known_calls_too(loss: Loss, generator: Generator) -> None:
    tensors = loss.example((3, 5), torch.float32, generator)

    def run(*inputs: Tensor) -> Tensor:
        return loss.function(*inputs, **options(loss), reduction="sum")

    run(*tensors)
    assert memo.known
    before = trace.calls()[loss.name, "formula"]
    with formula_path():
        run(*tensors)
    torch.func.grad(run)(*tensors)
    with forward_ad.dual_level():
        run(*tensors)
    with Passing():
        run(*tensors)
    torch.jit.trace(run, tensors, check_trace=False)
    assert trace.calls()[loss.name, "formula"] == before + 5
    assert fusedloss.explain(run, *tensors).kernel


@each_loss
def test_half_types_depend_on_autocast(loss: Loss, generator: Generator) -> None:
    tensors = loss.example((3, 5), torch.bfloat16, generator)
    for _ in range(2):
        assert loss.function(*tensors, **options(loss)).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert loss.function(*tensors, **options(loss)).dtype == torch.float32


def test_strict_mode_sees_known_calls() -> None:
    p = torch.tensor([[0.25, 0.75]]).repeat(8, 1)
    for _ in range(2):
        functional.kl_div(p, p, reduction="sum")
        with fusedloss.checks("strict"), pytest.raises(ValueError, match="kl_div"):
            functional.kl_div(p, p, reduction="sum")


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        ("mse_loss", (torch.ones(3, 1), torch.ones(3)), {}),
        (KL, (torch.zeros(3), torch.ones(3)), {"reduction": "mean"}),
        (CE, (torch.zeros(3, 4), tensor([0, 1, 2])), {"reduction": "elementwise_mean"}),
        (CE, (torch.zeros(3, 4), tensor([0, 1, 2])), {"size_average": False}),
    ],
)
def test_a_warning_comes_each_time(
    function: str, arguments: tuple[Tensor, ...], options: dict[str, object]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in (1, 2, 3):
            getattr(functional, function)(*arguments, **options)
            assert len(caught) == count


@pytest.mark.filterwarnings("ignore")  # of torch.jit.trace
def test_tracing_without_sizes() -> None:
    """In a trace each size is a tensor, which no key holds; a scalar has none."""
    x, y = torch.tensor(2.0), torch.tensor(5.0)
    for _ in range(2):
        assert functional.mse_loss(x, y) == 9
    traced = torch.jit.trace(functional.mse_loss, (x, y), check_trace=False)
    assert traced(x + 1, y) == 4


def test_values_are_checked_each_time() -> None:
    x, target = torch.zeros(3, 4), tensor([0, 1, 2])
    for leaf in (x, x.clone().requires_grad_()):
        for function in (functional.cross_entropy, functional.nll_loss):
            for _ in range(2):
                function(leaf, target)
            with pytest.raises(IndexError, match=r"target\[1\] = 9 is out of range for 4 classes"):
                function(leaf, tensor([0, 9, 2]))
    p = torch.full((3,), 0.5)
    for _ in range(2):
        functional.binary_cross_entropy(p, p)
    with pytest.raises(RuntimeError, match=r"target\[0\] = 1\.5"):
        functional.binary_cross_entropy(p, 3 * p)


def test_settings_that_are_equal_but_of_other_types() -> None:
    x, target = torch.zeros(3, 4), tensor([0, 1, 2])
    for function in (functional.cross_entropy, functional.nll_loss):
        function(x, target)
        with pytest.raises(TypeError, match="ignore_index"):
            function(x, target, ignore_index=-100.0)
    a = torch.zeros(2, 3)
    margin = tensor(1.0)
    assert functional.triplet_margin_loss(a, a, a, margin=margin) == 1
    margin += 1
    assert functional.triplet_margin_loss(a, a, a, margin=margin) == 2
    for swap in (False, True):
        functional.triplet_margin_loss(a, a, a, swap=swap)
        functional.kl_div(a, a, reduction="sum", log_target=swap)
        for alike in (int(swap), float(swap), np.int64(swap), np.bool_(swap)):
            with pytest.raises(TypeError, match="'swap' must be bool"):
                functional.triplet_margin_loss(a, a, a, swap=alike)
            with pytest.raises(TypeError, match="'log_target' must be bool"):
                functional.kl_div(a, a, reduction="sum", log_target=alike)
    for function in (functional.cross_entropy, functional.nll_loss):
        expected = function(x, target, ignore_index=1)
        assert function(x, target, ignore_index=np.int64(1)) == expected
        with pytest.raises(TypeError, match="'ignore_index' must be int, not bool"):
            function(x, target, ignore_index=True)
    with pytest.raises(ValueError, match="reduction"):
        functional.cross_entropy(x, target, reduction=[])


def test_a_call_that_never_comes_back_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in cpu.ENGINES.values():
        monkeypatch.setattr(engine, "prepare", lambda *_: pytest.fail("it was prepared"))
    for n in range(1, 9):
        functional.mse_loss(torch.zeros(n), torch.ones(n))


def test_what_is_known_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST", 4)
    for n in range(20):
        functional.mse_loss(torch.zeros(n), torch.ones(n))
        assert len(memo.known) <= 4


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss", "binary_cross_entropy"])
def test_weights_of_a_known_call_are_looked_at_anew(
    name: str, reduction: str, generator: Generator
) -> None:
    function, theirs = getattr(functional, name), getattr(torch.nn.functional, name)
    x, t = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64)
    before = trace.calls()[name, "kernel"]
    for k in range(1, 4):
        weight = torch.rand(4, 3, generator=generator, dtype=torch.float64)
        found = function(x, t, weight=weight, reduction=reduction)
        expected = theirs(x, t, weight=weight, reduction=reduction)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert trace.calls()[name, "kernel"] == before + k


def test_which_weight_a_known_call_has_is_no_matter_of_shapes(generator: Generator) -> None:
    name = "binary_cross_entropy_with_logits"
    ours, theirs = getattr(functional, name), getattr(torch.nn.functional, name)
    x, t, w = torch.rand(3, 4, 3, generator=generator, dtype=torch.float64)
    for _ in range(2):
        for settings in ({"weight": w}, {"pos_weight": w}, {"weight": w, "pos_weight": t}, {}):
            found, expected = ours(x, t, **settings), theirs(x, t, **settings)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_weights_that_are_converted_are_converted_each_time() -> None:
    x, t = torch.rand(2, 4, 3)
    for weight in (torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.float64)):
        for factor in (1, 2, 3):
            found = functional.binary_cross_entropy(x, t, weight * factor)
            expected = factor * torch.nn.functional.binary_cross_entropy(x, t)
            torch.testing.assert_close(found, expected.to(found.dtype))
