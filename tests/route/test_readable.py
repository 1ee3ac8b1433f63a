"""Tensors that are not what they seem: arguments, and gradients that arrive, are served or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import CASES, Case, Options, Tensors, no_head
from torch import Generator, Tensor
from torch.testing import assert_close

import fusedloss
from fusedloss.core import plain
from fusedloss.engines import cpu
from fusedloss.engines.cpu import load
from fusedloss.route import memo

each_case = pytest.mark.parametrize("case", list(filter(no_head, CASES)), ids=str)


class Wrapped(Tensor):
    """A subclass whose own memory holds nothing of its values."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def bare(value: Any) -> Any:
            return value.held if isinstance(value, Wrapped) else value

        return function(*map(bare, args), **{k: bare(v) for k, v in (kwargs or {}).items()})


def zero(tensor: Tensor) -> Tensor:
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


def negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_at_an_offset(tensor: Tensor) -> Tensor:
    flat = torch.zeros(tensor.numel() + 5, dtype=tensor.dtype)
    found = flat[5:].view(tensor.shape)
    flat.untyped_storage().resize_(0)
    return found


SERVED: list[Callable[[Tensor], Tensor]] = [zero, negated, Wrapped]
REFUSED = [freed, freed_at_an_offset]


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    memo.known.clear()
    yield
    memo.known.clear()


def arguments(case: Case, tensors: Tensors, options: Options) -> list[str | int]:
    return [*range(len(tensors)), *(k for k, v in options.items() if isinstance(v, Tensor))]


def replaced(
    at: str | int, by: Callable[[Tensor], Tensor], tensors: Tensors, options: Options
) -> tuple[Tensors, Options]:
    if isinstance(at, str):
        return tensors, {**options, at: by(options[at])}
    return tuple(by(t) if k == at else t for k, t in enumerate(tensors)), options


def value_and_gradients(
    case: Case, tensors: Tensors, options: Options, at: str | int
) -> tuple[Tensor, ...]:
    wanted = [k for k in case.loss.differentiable if k != at]
    inputs = [t.detach().requires_grad_() if k in wanted else t for k, t in enumerate(tensors)]
    value = case.loss.function(*inputs, **options)
    value = value.held if isinstance(value, Wrapped) else value
    if not wanted:
        return (value,)
    found = torch.autograd.grad(
        value, [inputs[k] for k in wanted], torch.full_like(value, 0.7), allow_unused=True
    )
    return value, *found


@each_case
@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_arguments_without_memory_of_their_own(
    case: Case, kind: Callable[[Tensor], Tensor], reduction: str, generator: Generator
) -> None:
    tensors, options = case.example((4, 5), torch.float64, generator)
    options = {**options, "reduction": reduction}
    for at in arguments(case, tensors, options):
        if kind is negated and at == 1 and case.loss.indices is not None:
            continue  # PyTorch negates no unsigned or index tensor lazily
        if kind is zero and case.loss.indices in case.loss.whole and at in (2, 3):
            continue  # all labels are counted by lengths
        as_is = zero_or_same(kind)
        expected = value_and_gradients(case, *replaced(at, as_is, tensors, options), at)
        for _ in range(2):  # the second time, plain tensors of these shapes are known
            given = replaced(at, kind, tensors, options)
            for got, want in zip(value_and_gradients(case, *given, at), expected, strict=True):
                assert_close(got, want, equal_nan=True)
            case.loss.function(*tensors, **options)
            value_and_gradients(case, tensors, options, at)


@each_case
def test_functional_arguments(case: Case, generator: Generator) -> None:
    """Those of torch's functionalization, which have no memory either, are not taken for freed ones."""
    tensors, options = case.example((4, 5), torch.float64, generator)
    expected = case.loss.function(*tensors, **options)
    for at in arguments(case, tensors, options):
        given, settings = replaced(at, torch._to_functional_tensor, tensors, options)
        found = case.loss.function(*given, **settings)
        torch._sync(found)
        assert_close(torch._from_functional_tensor(found), expected)


def zero_or_same(kind: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.zeros_like if kind is zero else torch.clone


@each_case
@pytest.mark.parametrize("kind", REFUSED)
def test_freed_arguments_are_refused_by_name(
    case: Case, kind: Callable[[Tensor], Tensor], generator: Generator
) -> None:
    tensors, options = case.example((4, 5), torch.float32, generator)
    if case.loss.name == "triplet_margin_with_distance_loss" and "lambda" in case.option:
        pytest.skip("the distance is the caller's, and reads them first")
    names = plain_names(case)
    for at in arguments(case, tensors, options):
        given, settings = replaced(at, kind, tensors, options)
        name = at if isinstance(at, str) else names[at]
        for _ in range(3):
            with pytest.raises(
                RuntimeError, match=f"{case.loss.name}.* storage of {name} was freed"
            ):
                case.loss.function(*given, **settings)
            case.loss.function(*tensors, **options)
            case.loss.function(*tensors, **options)


def plain_names(case: Case) -> tuple[str, ...]:
    return tuple(inspect.signature(case.loss.function).parameters)


def test_freed_weights_that_are_converted_first() -> None:
    x, t = torch.rand(3, 4), torch.rand(3, 4)
    functional = fusedloss.functional
    integers = freed(torch.ones(3, 4, dtype=torch.int32))
    calls = [
        lambda: functional.mse_loss(x, t, weight=freed(x)),
        lambda: functional.mse_loss(x, integers),
        lambda: functional.binary_cross_entropy(x, t, weight=integers),
        lambda: functional.binary_cross_entropy_with_logits(x, t, pos_weight=integers),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"storage of (pos_weight|weight|target) was freed"):
            call()
    with fusedloss.checks("strict"), pytest.raises(RuntimeError, match="storage of target was"):
        functional.mse_loss(x, freed(t))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_that_arrive(
    case: Case, dtype: torch.dtype, reduction: str, generator: Generator
) -> None:
    tensors, options = case.example((4, 5), dtype, generator)
    options = {**options, "reduction": reduction}
    leaf = tensors[0].clone().requires_grad_()

    def gradient(arriving: Callable[[Tensor], Tensor]) -> Tensor:
        value = case.loss.function(leaf, *tensors[1:], **options)
        return torch.autograd.grad(value, leaf, arriving(torch.full_like(value, -1.5)))[0]

    for _ in range(3):
        for kind in (zero, negated):
            got, want = gradient(kind), gradient(zero_or_same(kind))
            assert_close(got, want, atol=0, rtol=1e-3)
        for kind in REFUSED:
            with pytest.raises(RuntimeError, match=r"incoming|not allocated"):
                gradient(kind)


@each_case
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_sign_after_the_loss_sends_back_zero(
    case: Case, reduction: str, generator: Generator
) -> None:
    tensors, options = case.example((4, 5), torch.float32, generator)
    for _ in range(3):
        leaf = tensors[0].clone().requires_grad_()
        case.loss.function(
            leaf, *tensors[1:], **options, reduction=reduction
        ).sgn().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.count_nonzero() == 0


@each_case
def test_what_is_freed_before_backward(case: Case, generator: Generator) -> None:
    """An unreduced loss reads its inputs again."""
    if case.loss.name == "triplet_margin_with_distance_loss":
        return  # of which the caller's distance keeps what it likes
    tensors, options = case.example((4, 5), torch.float32, generator)
    for at in arguments(case, tensors, options):
        if {"weight", "sample_weight"} <= options.keys() and at in ("weight", "sample_weight"):
            continue  # their product is kept
        inputs = [t.clone() for t in tensors]
        settings = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
        leaf = inputs[0] = inputs[0].requires_grad_()
        value = case.loss.function(*inputs, **settings, reduction="none")
        given = settings[at] if isinstance(at, str) else inputs[at]
        given.untyped_storage().resize_(0)
        # By then a sample_weight is the weight of the kernel.
        named = at.removeprefix("sample_") if isinstance(at, str) else ""
        with pytest.raises(RuntimeError, match=f"storage of {named}"):
            torch.autograd.grad(value, leaf, torch.ones_like(value))


def test_no_packer_takes_null_for_absent() -> None:
    x, nothing = torch.rand(3, 4), zero(torch.rand(3, 4))
    labels = torch.tensor([0, 1, 2])
    packed = [
        lambda: cpu.ENGINES["pointwise"].backward(
            mse("none"), (x, x, None), (True, False), nothing
        ),
        lambda: cpu.ENGINES["pointwise"].forward(mse("sum"), (x, x, nothing), ()),
        lambda: cpu.ENGINES["rows"].forward(rows(), (x, zero(labels), None), ()),
        lambda: cpu.ENGINES["reduction"].forward(triplet(), (x, nothing, x), ()),
    ]
    for call in packed:
        with pytest.raises(RuntimeError, match=r"(incoming|weight|target|positive) .*no memory"):
            call()
    assert load.address("mse_loss", "input", torch.rand(0, 3)) == 0


def mse(reduction: str) -> Any:
    from fusedloss.kinds.pointwise import PointwiseCall
    from fusedloss.losses.regression import MSE

    return PointwiseCall(MSE, (), reduction, None, torch.float32)


def rows() -> Any:
    from fusedloss.kinds.rows import RowsCall

    return RowsCall("cross_entropy", False, "sum", -100, 0.0, torch.float32)


def triplet() -> Any:
    from fusedloss.kinds.reduction import ReductionCall

    return ReductionCall("triplet", (2.0, 1e-6, 1.0), "sum", torch.float32)


def test_gaps() -> None:
    x = torch.rand(4, 6)
    views = x, x.t(), x[1:, ::2], x[:1].expand(9, 6), x[:0], torch.rand(()), torch.nn.Parameter(x)
    assert [plain.gap(view) for view in views] == [None] * len(views)
    others = zero(x), negated(x), Wrapped(x), x.to_sparse(), x.to("meta")
    reasons = "zero tensor", "lazy sign", "subclass", "layout", "meta"
    for other, reason in zip(others, reasons, strict=True):
        assert reason in str(plain.gap(other))
    x.untyped_storage().resize_(0)
    assert [plain.gap(view) for view in views[:4]] == [plain.FREED] * 4
