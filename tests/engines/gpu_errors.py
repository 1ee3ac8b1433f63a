"""What is wrong in the values of tensors, told without a sync; where Triton fails. For test_gpu.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import (
    CASES,
    DEVICE,
    FLOATS,
    GPU,
    name_of,
    run,
    same_bits,
)
from torch import Generator, Tensor, tensor

import fusedloss
from fusedloss import functional
from fusedloss.cli import info
from fusedloss.engines import gpu
from fusedloss.engines.gpu import (
    flags,
    launch,
    nll,
)
from fusedloss.kinds.rows import RowsCall

assert GPU, "test_gpu.py runs this file"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    fusedloss.synchronize()


BAD = r"cross_entropy: target\[2, 1\] = 7 is out of range for 4 classes \(ignore_index = -100\)"


def bad_labels() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 4, 5, generator=Generator().manual_seed(0)).to(DEVICE)
    y = torch.zeros(3, 5, dtype=torch.int64, device=DEVICE)
    y[2, 1] = 7
    return x, y


def settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def test_a_bad_label_makes_its_row_nan_and_is_raised_once(generator: Generator) -> None:
    x, y = bad_labels()
    losses = functional.cross_entropy(x, y, reduction="none")
    settle()
    assert losses.isnan().nonzero().tolist() == [[2, 1]]
    with pytest.raises(IndexError, match=BAD):
        fusedloss.synchronize()
    fusedloss.synchronize()
    y[2, 1] = 3
    expected = torch.nn.functional.cross_entropy(x, y)
    torch.testing.assert_close(functional.cross_entropy(x, y), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("value", [4, -1, 2**40, -(2**40)])
def test_a_bad_label_in_every_form(function: str, reduction: str, value: int) -> None:
    x, y = bad_labels()
    y[2, 1] = value
    loss = getattr(functional, function)(x, y, reduction=reduction)
    settle()
    assert loss.isnan().any()
    with pytest.raises(IndexError, match=rf"{function}: target\[2, 1\] = {value} is out of range"):
        fusedloss.synchronize()


def test_the_next_call_raises_whatever_it_is() -> None:
    functional.cross_entropy(*bad_labels())
    settle()
    a = torch.zeros(3, device=DEVICE)
    with pytest.raises(IndexError, match=BAD):
        functional.mse_loss(a, a)
    assert functional.mse_loss(a, a).item() == 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_raises(reduction: str) -> None:
    x, y = bad_labels()
    loss = functional.cross_entropy(x.requires_grad_(), y, reduction=reduction)
    settle()
    with pytest.raises(IndexError, match=BAD):
        loss.sum().backward()


def test_a_bad_label_leaves_the_other_gradients() -> None:
    """What a step takes that runs before the error is known."""
    x, y = bad_labels()
    call = RowsCall("cross_entropy", False, "sum", -100, 0.0, torch.float32)
    _, (expected, *_) = gpu.engine_of("rows").forward(
        call, (x, y.clamp(max=3), None), (True, False, False)
    )
    _, (grad, *_) = gpu.engine_of("rows").forward(call, (x, y, None), (True, False, False))
    assert grad is not None and expected is not None
    rest = torch.ones_like(y, dtype=torch.bool)
    rest[2, 1] = False
    assert same_bits(grad.movedim(1, 2)[rest], expected.movedim(1, 2)[rest])
    assert grad[2, :, 1].eq(0).all()
    with pytest.raises(IndexError):
        fusedloss.synchronize()


def test_checks_eager_raises_at_the_call() -> None:
    with fusedloss.checks("eager"), pytest.raises(IndexError, match=BAD):
        functional.cross_entropy(*bad_labels())


def test_the_first_of_many_programs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nll, "POSITIONS", 4)
    x = torch.zeros(40, 3, device=DEVICE)
    functional.nll_loss(x, torch.full((40,), 3, device=DEVICE))
    with pytest.raises(IndexError, match=r"target\[\d+\] = 3 is out of range for 3 classes"):
        fusedloss.synchronize()
    fusedloss.synchronize()


@pytest.mark.parametrize("sign", ["", "u"])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_class_indices_of_any_integer_type(function: str, bits: int, sign: str) -> None:
    dtype = getattr(torch, f"{sign}int{bits}")
    x = torch.randn(6, 4, generator=Generator().manual_seed(1)).to(DEVICE)
    y = tensor([0, 3, 2, 1, 3, 0], device=DEVICE)
    found = getattr(functional, function)(x, y.to(dtype), ignore_index=3)
    expected = getattr(torch.nn.functional, function)(x, y, ignore_index=3)
    torch.testing.assert_close(found, expected)
    getattr(functional, function)(x, torch.full((6,), 100, device=DEVICE).to(dtype))
    with pytest.raises(IndexError, match=r"target\[0\] = 100 is out of range"):
        fusedloss.synchronize()


OUTSIDE = [
    (0, (1, 2), 1.5, r"input should be between 0 and 1, but input\[1, 2\] = 1\.5.*with_logits"),
    (0, (0, 0), math.nan, r"input should be between 0 and 1, but input\[0, 0\] = nan"),
    (1, (2, 3), -0.25, r"target should be between 0 and 1, but target\[2, 3\] = -0\.25"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("argument", "at", "value", "words"), OUTSIDE)
def test_a_probability_outside(
    argument: int, at: tuple[int, int], value: float, words: str, dtype: torch.dtype
) -> None:
    tensors = [torch.full((3, 4), 0.5, dtype=dtype, device=DEVICE) for _ in range(2)]
    tensors[argument][at] = value
    losses = functional.binary_cross_entropy(*tensors, reduction="none")
    settle()
    assert losses.isnan().nonzero().tolist() == [list(at)]
    with pytest.raises(RuntimeError, match=f"binary_cross_entropy: all elements of {words}"):
        fusedloss.synchronize()


def test_records_are_shared() -> None:
    x, y = bad_labels()
    y.zero_()
    functional.cross_entropy(x, y)
    before = len(flags._by_number)
    for _ in range(3):
        functional.cross_entropy(x, y)
    assert len(flags._by_number) == before


# Where Triton fails


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    def fail(*_: Any) -> None:
        raise OSError("no compiler")

    yield lambda: monkeypatch.setattr(launch, "run", fail)
    gpu.available.failures.clear()


@pytest.mark.parametrize("function", ["mse_loss", "cross_entropy"])
def test_the_formula_runs_where_triton_fails(function: str, failing: Callable[[], None]) -> None:
    case = next(c for c in CASES if c.loss.name == function)
    tensors, options = case.example((5, 4), torch.float32, Generator().manual_seed(0))
    expected = run(case.loss.torch_function, tensors, options, (0,))
    failing()
    with pytest.warns(
        UserWarning, match="Triton failed: OSError: no compiler.*the formula"
    ) as told:
        found = run(case.loss.function, tensors, options, (0,))
    assert len(told) == 1
    again = run(case.loss.function, tensors, options, (0,))
    for outcome in (found, again):
        for (_, a), (_, e) in zip(outcome.named(), expected.named(), strict=True):
            torch.testing.assert_close(a, e)
    route = fusedloss.explain(case.loss.function, *tensors, **options)
    assert route.kernel is None and "no compiler" in route.why
    assert gpu.problem("reduction") is None
    assert info.facts()["GPU kernels"].startswith("off: Triton failed: OSError")


def test_the_formula_differentiates_where_triton_fails_in_backward(
    failing: Callable[[], None],
) -> None:
    x = torch.randn(5, 4, generator=Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    y = torch.zeros(5, 4, device=DEVICE)
    losses = functional.mse_loss(x, y, reduction="none")
    failing()
    with pytest.warns(UserWarning, match="Triton failed"):
        losses.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("within", ["forward", "backward"])
@pytest.mark.parametrize("function", ["cross_entropy", "triplet_margin_loss"])
def test_the_formula_runs_in_a_compiled_graph_where_triton_fails(
    function: str, within: str, failing: Callable[[], None]
) -> None:
    case = next(c for c in CASES if c.loss.name == function)
    tensors, _ = case.example((5, 4), torch.float32, Generator().manual_seed(0))
    x, *rest = tensors
    reduction = "mean" if within == "forward" else "none"  # a mean's backward runs no kernel
    ours, theirs = (
        functools.partial(f, reduction=reduction)
        for f in (case.loss.function, case.loss.torch_function)
    )
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def both(function: Callable[..., Tensor], fails: bool = False) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone().requires_grad_()
        value = function(leaf, *rest)
        if fails:
            failing()
        return value.detach(), torch.autograd.grad(value, leaf, torch.ones_like(value))[0]

    expected = both(theirs)
    torch.testing.assert_close(both(compiled), expected)
    if within == "forward":
        failing()
    with pytest.warns(UserWarning, match="Triton failed") as told:
        found = both(compiled, within == "backward")
    assert len(told) == 1
    for outcome in (found, both(compiled)):
        torch.testing.assert_close(outcome, expected)
