"""A denominator takes the place of the count that 'mean' divides by: a number, or a tensor of one."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import (
    EVERY_CASE,
    Case,
    Options,
    Outcome,
    Tensors,
    assert_same_bits,
    formula_path,
    leaves,
    run,
)
from torch import Generator, Tensor

from fusedloss import functional
from fusedloss.core import trace
from fusedloss.front.definition import REGISTRY
from fusedloss.front.modules import MODULES
from fusedloss.route import memo

N = 7.3
TWO_COUNTS = ("dice_cross_entropy", "dice_focal")  # one of overlaps, one of rows


def takes_one(case: Case) -> bool:
    return "denominator" in inspect.signature(case.loss.function).parameters


CASES = [case for case in EVERY_CASE if takes_one(case)]
ALONE = [case for case in CASES if case.kind != "heads"]  # which have tests of their own
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_loss = pytest.mark.parametrize("case", ALONE, ids=str)


def test_which_losses_take_one() -> None:
    for loss in REGISTRY.values():
        parameters = inspect.signature(loss.function).parameters
        wanted = "mean" in loss.reductions and loss.name not in TWO_COUNTS
        assert ("denominator" in parameters) is wanted, loss.key
        if wanted:
            found = parameters["denominator"]
            assert found.kind is found.KEYWORD_ONLY and found.default is None
            assert "denominator: " in (loss.function.__doc__ or "")


def shape_of(case: Case) -> tuple[int, ...]:
    return (5, 6, 4)[: case.loss.dims]


def over_none(case: Case) -> Callable[..., Tensor]:
    """The sum of what 'mean' counts over `N`, by reductions without a denominator."""

    def function(*tensors: Tensor, **options: Any) -> Tensor:
        if case.kind == "sequences":  # each loss is over its own labels before
            return case.function(*tensors, **options, reduction="mean") * (len(tensors[3]) / N)
        return case.function(*tensors, **options, reduction="sum") / N

    return function


def close(found: Outcome, expected: Outcome, rtol: float) -> None:
    for (name, a), (_, e) in zip(found.named(), expected.named(), strict=True):
        torch.testing.assert_close(
            a.double(),
            e.double(),
            rtol=rtol,
            atol=rtol,
            equal_nan=True,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )


def expected(case: Case, tensors: Tensors, options: Options) -> Outcome:
    """In float64, by the formula."""
    wide = tuple(t.double() if t.is_floating_point() else t for t in tensors)
    settings = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in options.items()
    }
    with formula_path():
        return run(over_none(case), wide, settings, case.loss.differentiable)


NUMBERS: dict[str, Callable[[], Any]] = {
    "number": lambda: N,
    "float32": lambda: torch.tensor(N),
    "float64": lambda: torch.tensor(N, dtype=torch.float64),
    "learned": lambda: torch.tensor(N, dtype=torch.float64, requires_grad=True),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_case
def test_mean_divides_by_it(
    case: Case, dtype: torch.dtype, kind: str, generator: Generator
) -> None:
    tensors, options = case.example(shape_of(case), dtype, generator)
    want = expected(case, tensors, options)
    given = {**options, "denominator": NUMBERS[kind]()}
    exact = dtype is torch.float64 and kind != "float32"
    for _ in range(3):  # the short way, if there were one
        found = run(case.function, tensors, given, case.loss.differentiable)
        close(found, want, 1e-12 if exact else 1e-5)
        assert found.value.dtype is run(case.function, tensors, options).value.dtype
    with formula_path():
        close(
            run(case.function, tensors, given, case.loss.differentiable),
            want,
            1e-12 if exact else 1e-5,
        )


@each_loss
def test_the_kernel_serves(case: Case, generator: Generator) -> None:
    tensors, options = case.example(shape_of(case), torch.float32, generator)
    for denominator in (N, torch.tensor(9), torch.tensor(N, requires_grad=True)):
        before = trace.calls()[case.loss.name, "kernel"]
        run(
            case.function,
            tensors,
            {**options, "denominator": denominator},
            case.loss.differentiable,
        )
        assert trace.calls()[case.loss.name, "kernel"] == before + 1


@each_case
def test_integers_keep_the_digits_of_float64(case: Case, generator: Generator) -> None:
    tensors, options = case.example(shape_of(case), torch.float64, generator)
    want = run(case.function, tensors, {**options, "denominator": 10.0}, case.loss.differentiable)
    for count in (10, torch.tensor(10), torch.tensor(10, dtype=torch.uint8)):
        given = {**options, "denominator": count}
        close(run(case.function, tensors, given, case.loss.differentiable), want, 1e-14)


@each_case
def test_what_it_holds_is_read_each_time(case: Case, generator: Generator) -> None:
    tensors, options = case.example(shape_of(case), torch.float32, generator)
    count = torch.tensor(1.0)
    for k in range(4):
        count.fill_(2.0**k)
        memo.known.clear()
        want = run(
            case.function, tensors, {**options, "denominator": 2.0**k}, case.loss.differentiable
        )
        found = run(
            case.function, tensors, {**options, "denominator": count}, case.loss.differentiable
        )
        assert_same_bits(found, want)
        # Between such calls, one whose count is its own.
        run(case.function, tensors, options, case.loss.differentiable)


@each_loss
def test_a_denominator_that_learns(case: Case, generator: Generator) -> None:
    tensors, options = case.example(shape_of(case), torch.float64, generator)
    count = torch.tensor(N, dtype=torch.float64, requires_grad=True)
    loss = case.function(*tensors, **options, denominator=count)
    (slope,) = torch.autograd.grad(loss, count)
    torch.testing.assert_close(slope, -loss.detach() / N)


@each_loss
def test_second_derivatives(case: Case, generator: Generator) -> None:
    tensors, options = case.example(shape_of(case)[:2], torch.float64, generator)
    found = []
    plain = over_none(case)
    for function in (plain, lambda *t, **o: case.function(*t, **o, denominator=N)):
        inputs = leaves(tensors, case.loss.differentiable)
        learned = [inputs[k] for k in case.loss.differentiable]
        grads = torch.autograd.grad(function(*inputs, **options), learned, create_graph=True)
        total = sum((g.square().sum() for g in grads), torch.zeros((), dtype=torch.float64))
        if not total.requires_grad:  # what is linear has none
            return
        found.append(torch.autograd.grad(total, learned, allow_unused=True, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_loss
def test_of_half_types(case: Case, dtype: torch.dtype, generator: Generator) -> None:
    tensors, options = case.example(shape_of(case), dtype, generator)
    want = expected(case, tensors, options)
    for count in (N, torch.tensor(N, requires_grad=True)):
        found = run(
            case.function, tensors, {**options, "denominator": count}, case.loss.differentiable
        )
        close(found, want, 8 * torch.finfo(dtype).eps)


def test_a_sum_that_float16_does_not_hold() -> None:
    x, t = (
        torch.full((300, 300), 1.0, dtype=torch.float16),
        torch.zeros(300, 300, dtype=torch.float16),
    )
    for count in (90000, torch.tensor(90000.0, requires_grad=True)):
        assert functional.mse_loss(x, t, denominator=count) == 1


@pytest.mark.parametrize("count", [0, torch.tensor(0), math.nan], ids=str)
def test_nothing_to_divide_by(count: Any) -> None:
    x = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = functional.mse_loss(x, torch.ones(2), denominator=count)
    assert loss == math.inf or loss.isnan()
    (grad,) = torch.autograd.grad(loss, x)
    assert not grad.isfinite().any()


def test_no_row_that_counts_is_no_nan() -> None:
    x, t = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    loss = functional.cross_entropy(x, t, denominator=5)
    loss.backward()
    assert loss == 0 and x.grad is not None and not x.grad.any()


@each_case
def test_only_mean_divides(case: Case, generator: Generator) -> None:
    tensors, options = case.example(shape_of(case), torch.float32, generator)
    for reduction in case.reductions:
        if reduction != "mean":
            with pytest.raises(
                ValueError, match=f"denominator is for reduction = 'mean', got '{reduction}'"
            ):
                case.function(*tensors, **options, reduction=reduction, denominator=N)


@pytest.mark.parametrize(
    ("count", "kind", "words"),
    [
        (torch.ones(2), ValueError, r"denominator must be a number or a 0-dim tensor, got \[2\]"),
        (torch.tensor(1j), TypeError, "denominator must be real, got torch.complex64"),
        ("7", TypeError, "argument 'denominator' must be float, not str"),
        (torch.tensor(1.0, device="meta"), RuntimeError, "denominator is on meta, "),
    ],
    ids=["vector", "complex", "word", "elsewhere"],
)
@pytest.mark.parametrize(
    "case", [case for case in ALONE if case.option in ("plain", "all")], ids=str
)
def test_refused(
    case: Case, count: Any, kind: type[Exception], words: str, generator: Generator
) -> None:
    tensors, options = case.example(shape_of(case), torch.float32, generator)
    with pytest.raises(kind, match=f"{case.loss.name}: .*{words}"):
        case.function(*tensors, **options, denominator=count)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.one_in(3)
@each_loss
def test_compiled(case: Case, generator: Generator) -> None:
    """A graph serves every count."""
    tensors, options = case.example(shape_of(case)[:2], torch.float32, generator)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(denominator: Any, *tensors: Tensor) -> Tensor:
        return case.function(*tensors, **options, denominator=denominator)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    for number in (3.0, 11.0, 12.5, 40.0):
        count = torch.tensor(number)
        found, want = (
            run(functools.partial(function, count), tensors, {}, case.loss.differentiable)
            for function in (compiled, step)
        )
        close(found, want, 1e-5)
    assert counter.frame_count == 1


def test_compiled_for_integers_that_change() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functional.cross_entropy, backend=counter, fullgraph=True)
    x, t = torch.randn(6, 5), torch.arange(6) % 5
    for count in range(3, 12):
        torch.testing.assert_close(
            compiled(x, t, denominator=count), functional.cross_entropy(x, t, denominator=count)
        )
    assert counter.frame_count <= 2


@each_loss
def test_mapped(case: Case, generator: Generator) -> None:
    tensors, options = case.example(shape_of(case)[:2], torch.float64, generator)
    counts = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    found = torch.vmap(lambda n: case.function(*tensors, **options, denominator=n))(counts)
    want = torch.stack([case.function(*tensors, **options, denominator=n) for n in counts])
    torch.testing.assert_close(found, want)


def test_traced_and_differentiated_forwards(recwarn: pytest.WarningsRecorder) -> None:
    x, t = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    traced = torch.jit.trace(
        lambda x, n: functional.cross_entropy(x, t, denominator=n), (x, torch.tensor(3.0))
    )
    n = torch.tensor(8.0)
    torch.testing.assert_close(traced(x, n), functional.cross_entropy(x, t, denominator=8))
    _, slope = torch.func.jvp(
        lambda n: functional.cross_entropy(x, t, denominator=n), (n,), (torch.ones(()),)
    )
    torch.testing.assert_close(slope, -functional.cross_entropy(x, t, denominator=64))


@each_loss
def test_modules(case: Case, generator: Generator) -> None:
    if not case.loss.module:
        return
    tensors, options = case.example(shape_of(case), torch.float64, generator)
    of_call = {n: options.pop(n) for n in ("sample_weight",) if n in options}
    made = MODULES[case.loss.module]
    if not set(options) <= set(inspect.signature(made).parameters):
        return  # PyTorch's module takes no weight
    module = made(**options)
    found = module(*tensors, **of_call, denominator=N)
    torch.testing.assert_close(found, case.function(*tensors, **options, **of_call, denominator=N))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_modules_have_none() -> None:
    module = torch.jit.script(MODULES["CrossEntropyLoss"]())
    x, t = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(module(x, t), functional.cross_entropy(x, t))
    with pytest.raises(Exception, match="TorchScript has no denominator"):
        module(x, t, denominator=torch.tensor(3.0))


def test_integers_and_complex_numbers() -> None:
    x, t = torch.tensor([1, 2, 5]), torch.tensor([0, 4, 1])
    for count in (7, torch.tensor(7)):
        found = functional.l1_loss(x, t, denominator=count)
        assert found.dtype is torch.float32 and found == 1
        assert functional.l1_loss(x + 0j, t, denominator=count) == 1


def test_strict_checks_fear_for_no_mean() -> None:
    from fusedloss import checks

    x, t = torch.randn(3, 4), torch.full((3,), -100)
    with checks("strict"):
        with pytest.raises(ValueError):
            functional.cross_entropy(x, t)
        assert functional.cross_entropy(x, t, denominator=4) == 0
