"""The second call of a kind takes the short way: no check runs again, and no argument is packed anew."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import (
    CASES,
    OVERLAPS,
    Case,
    Options,
    Tensors,
    assert_same_bits,
    each_dtype,
    no_head,
    run,
)
from torch import Generator, Tensor

from fusedloss import functional
from fusedloss.core import trace
from fusedloss.engines import cpu
from fusedloss.front.modules import MODULES
from fusedloss.route import dispatch, memo

EVERY = [case for case in (*CASES, *OVERLAPS) if no_head(case)]
each_case = pytest.mark.parametrize("case", EVERY, ids=str)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    memo.known.clear()
    yield
    memo.known.clear()


def packed_anew(case: Case) -> bool:
    """How long sequences are, and where their labels begin, are values, which no plan keeps."""
    return case.kind == "sequences"


def takes_the_short_way(
    monkeypatch: pytest.MonkeyPatch, case: Case, step: Callable[[], object]
) -> None:
    """The third time: the first two make what is known, and its plans."""
    step(), step()
    before = trace.calls()[case.loss.name, "kernel"]
    with monkeypatch.context() as watched:
        watched.setattr(dispatch, "formula_reason", lambda *_: pytest.fail("checked again"))
        if not packed_anew(case):
            for engine in cpu.ENGINES.values():
                watched.setattr(engine, "pack", lambda *_: pytest.fail("packed anew"))
        step()
    assert trace.calls()[case.loss.name, "kernel"] == before + 1


def shape_of(case: Case) -> tuple[int, ...]:
    return (4, 6, 3)[: case.loss.dims]


def dense(tensors: Tensors) -> Tensors:
    return tensors


def spread(tensors: Tensors) -> Tensors:
    """With the second dimension innermost, as in channels last or a transposed matrix."""

    def one(t: Tensor) -> Tensor:
        return (
            t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t.t().clone().t()
        )

    return tuple(one(t) if t.dim() > 1 else t for t in tensors)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("layout", [dense, spread])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each_dtype
@each_case
def test_of_every_option_set(
    case: Case,
    dtype: torch.dtype,
    reduction: str,
    layout: Callable[[Tensors], Tensors],
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reduction not in case.reductions:
        return
    tensors, options = case.example(shape_of(case), dtype, generator)
    given, options = layout(tensors), {**options, "reduction": reduction}
    for wanted in ((), case.loss.differentiable, case.loss.differentiable[-1:]):
        takes_the_short_way(
            monkeypatch,
            case,
            lambda: run(case.loss.function, given, options, wanted),  # noqa: B023
        )


@pytest.mark.parametrize("reduction", ["none", "mean"])
@each_case
def test_of_modules(
    case: Case, reduction: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reduction not in case.reductions or not case.loss.module:
        return
    tensors, options = case.example(shape_of(case), torch.float32, generator)
    of_call = {n: options.pop(n) for n in ("sample_weight",) if n in options}
    made = MODULES[case.loss.module]
    if not set(options) <= set(inspect.signature(made).parameters):
        return  # PyTorch's module takes no weight
    module = made(**options, reduction=reduction)
    wanted = case.loss.differentiable
    takes_the_short_way(monkeypatch, case, lambda: run(module, tensors, of_call, wanted))


def over_another(case: Case) -> bool:
    """Whether a mean may be over another number; plans of sequences, overlaps, means of classes hold theirs."""
    parameters = inspect.signature(case.loss.function).parameters
    holds = case.kind in ("sequences", "dice") or case.loss.name == "multilabel_soft_margin_loss"
    return "denominator" in parameters and not holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", list(filter(over_another, EVERY)), ids=str)
def test_over_denominators(
    case: Case, dtype: torch.dtype, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one each time: a number, and tensors of several types."""
    tensors, options = case.example(shape_of(case), dtype, generator)
    numbers: list[float | Tensor] = [7, 0.5, torch.tensor(3), torch.tensor(5.0), 7.0, -2.0]

    def over(number: float | Tensor) -> list[Tensor]:
        given = {**options, "reduction": "mean", "denominator": number}
        return run(case.loss.function, tensors, given, case.loss.differentiable)

    first = []
    for number in numbers:
        memo.known.clear()
        first.append(over(number))
    memo.known.clear()
    left = iter(numbers)
    takes_the_short_way(monkeypatch, case, lambda: over(next(left)))
    for number, expected in zip(numbers, first, strict=True):
        assert_same_bits(over(number), expected)
    for number, expected in ((math.nan, math.nan), (math.inf, 0.0)):
        torch.testing.assert_close(over(number)[0].item(), expected, equal_nan=True)


def test_denominators_that_only_checks_know() -> None:
    x = torch.zeros(3, 4)
    for _ in range(3):
        functional.mse_loss(x, x, denominator=2)
    for wrong in ("2", torch.ones(2), torch.tensor(1j), object()):
        with pytest.raises((TypeError, ValueError), match="denominator"):
            functional.mse_loss(x, x, denominator=wrong)  # type: ignore[arg-type]
    given = (x + 1).requires_grad_()
    for number in (2.0, 2.0, 4.0, 8.0):
        value = functional.mse_loss(given, x, denominator=number)
        (grad,) = torch.autograd.grad(value, given, create_graph=True)
        assert (grad == 2 / number).all()
    learned = torch.tensor(2.0, requires_grad=True)
    functional.mse_loss(x + 1, x, denominator=learned).backward()
    assert learned.grad == -3
    with pytest.raises(ValueError, match="denominator is for"):
        functional.mse_loss(x, x, reduction="sum", denominator=2)


def changed_in_place(options: Options) -> None:
    for value in options.values():
        if isinstance(value, Tensor):
            value.mul_(0.5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each_case
def test_no_value_is_kept(case: Case, reduction: str, generator: Generator) -> None:
    """Nor of a weight that is changed in place, nor of the number of elements that count."""
    if reduction not in case.reductions:
        return
    shape = shape_of(case)
    tensors, options = case.example(shape, torch.float32, generator)
    options = {**options, "reduction": reduction}
    wanted = case.loss.differentiable
    for _ in range(3):
        run(case.loss.function, tensors, options, wanted)
    others, _ = case.example(shape, torch.float32, generator)
    changed_in_place(options)
    found = run(case.loss.function, others, options, wanted)
    memo.known.clear()
    assert_same_bits(found, run(case.loss.function, others, options, wanted))


def test_numbers_that_are_tensors() -> None:
    x, margin = torch.zeros(3, 4), torch.tensor(0.5)
    weight, t = torch.tensor(2.0), torch.ones(3, 4)
    for factor in (1.0, 2.0, 4.0):
        assert (
            functional.triplet_margin_loss(x, x, x, margin=0.5 * margin * factor) == 0.25 * factor
        )
        found = functional.binary_cross_entropy(t, x, weight=weight)
        assert found == 100 * weight
        weight.add_(1)


@each_case
def test_layouts_options_and_grad_mode_in_turn(case: Case, generator: Generator) -> None:
    wanted, calls = case.loss.differentiable, []
    for dtype in (torch.float32, torch.float64):
        tensors, options = case.example(shape_of(case), dtype, generator)
        for reduction in case.reductions:
            settings = {**options, "reduction": reduction}
            for given in (tensors, spread(tensors)):
                calls += [(given, settings, wanted), (given, settings, ())]
    first = [run(case.loss.function, *call) for call in calls]
    for _ in range(2):
        for call, expected in zip(calls, first, strict=True):
            assert_same_bits(run(case.loss.function, *call), expected)
            inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in call[0]]
            with torch.no_grad():
                assert not case.loss.function(*inputs, **call[1]).requires_grad
            with torch.inference_mode():
                assert case.loss.function(*inputs, **call[1]).is_inference()


def test_scalars_and_tensors_that_are_given_twice() -> None:
    for _ in range(3):
        x = torch.tensor(2.0, requires_grad=True)
        functional.mse_loss(x, torch.tensor(5.0)).backward()
        assert x.grad == -6
        assert functional.cross_entropy(torch.zeros(4), torch.tensor(1)) > 1
        a = torch.randn(3, 4, requires_grad=True)
        loss = functional.triplet_margin_loss(a, a, a)
        assert loss == 1
        loss.backward()


def test_many_shapes_in_turn() -> None:
    for _ in range(2):
        for n in range(1, 2001):
            x = torch.zeros(n, requires_grad=True)
            functional.mse_loss(x, torch.ones(n)).backward()
            assert x.grad is not None and len(memo.known) <= memo.MOST
    # Of one shape, too: by strides, and by which tensors learn.
    for k in range(100):
        functional.mse_loss(torch.zeros(3, k + 1)[:, :1], torch.zeros(3, 1))
    assert max(map(len, memo.known.values())) <= memo.ALIKE


def test_threads_share_what_is_known(generator: Generator) -> None:
    calls = []
    for case in EVERY[::7]:
        tensors, options = case.example(shape_of(case), torch.float32, generator)
        calls.append((case.loss.reduced, tensors, options, case.loss.differentiable))
    expected = [run(*call) for call in calls]
    memo.known.clear()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                for call, want in zip(calls, expected, strict=True):
                    assert_same_bits(run(*call), want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_what_lacks_is_named_where_other_tensors_are_there(generator: Generator) -> None:
    x, weight = (torch.rand(shape, generator=generator) for shape in ((4, 3), (3,)))
    for target in (x, x, None):
        given = {"weight": weight, "pos_weight": weight}
        if target is None:
            with pytest.raises(AttributeError, match="argument 'target' must be Tensor"):
                functional.binary_cross_entropy_with_logits(x, None, **given)  # type: ignore[arg-type]
        else:
            functional.binary_cross_entropy_with_logits(x, target, **given)
