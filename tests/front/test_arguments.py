"""Arguments that are no tensors: what PyTorch takes for an integer, a number or a bool, and nothing else."""

from __future__ import annotations

import decimal
import fractions
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from conftest import formula_path, same_bits
from torch import Tensor, tensor
from torch.nn import functional as theirs
from torch.testing import assert_close

from fusedloss import functional as ours
from fusedloss import nn
from fusedloss.route import memo

X = torch.linspace(0.05, 0.95, 12).reshape(3, 4)
P = X.flip(0)
Y = tensor([0, 1, 2])
LOG_P, Q = X.log_softmax(1), P.softmax(1)
TRIPLET = (X, P, X + 1)
EXAMPLE: dict[str, tuple[Tensor, ...]] = {
    "cross_entropy": (X, Y),
    "nll_loss": (LOG_P, Y),
    "kl_div": (LOG_P, Q),
    "triplet_margin_loss": TRIPLET,
    "triplet_margin_with_distance_loss": TRIPLET,
    "linear_cross_entropy": (X, P, Y),
}
ARGUMENTS = [
    ("cross_entropy", "ignore_index"),
    ("cross_entropy", "label_smoothing"),
    ("nll_loss", "ignore_index"),
    ("kl_div", "log_target"),
    ("triplet_margin_loss", "margin"),
    ("triplet_margin_loss", "p"),
    ("triplet_margin_loss", "eps"),
    ("triplet_margin_loss", "swap"),
    ("triplet_margin_with_distance_loss", "margin"),
    ("triplet_margin_with_distance_loss", "swap"),
    ("triplet_margin_with_distance_loss", "distance_function"),
    ("linear_cross_entropy", "ignore_index"),
    ("linear_cross_entropy", "label_smoothing"),
]


class Index:
    def __index__(self) -> int:
        return 1


class Number:
    def __float__(self) -> float:
        return 1.0


VALUES: list[Any] = [
    *(1, 0, 2, 10**400, True, False, 1.0, 0.5, 1j, None, "1", "False", b"1", (), [1], {}),
    *(np.int64(1), np.int32(1), np.uint8(1), np.float32(0.5), np.float64(0.5), np.bool_(True)),
    *(np.array(1), np.array(0.5), np.array([1])),
    *(fractions.Fraction(3, 4), decimal.Decimal("0.75"), Index(), Number()),
    *(tensor(1), tensor([1]), tensor(1, dtype=torch.int32), tensor(1, dtype=torch.uint8)),
    *(tensor(0.5), tensor([0.5]), tensor(0.5).double(), tensor(0.5, requires_grad=True)),
]


def outcome(face: Any, loss: str, options: dict[str, Any]) -> Tensor | Exception:
    try:
        return getattr(face, loss)(*EXAMPLE[loss], **options)
    except Exception as error:
        return error


@pytest.mark.parametrize("path", [nullcontext, formula_path], ids=["kernel", "formula"])
@pytest.mark.parametrize(("loss", "argument"), ARGUMENTS)
@pytest.mark.filterwarnings("ignore:.*'mean' divides")
def test_takes_what_torch_takes(loss: str, argument: str, path: Callable[[], Any]) -> None:
    memo.known.clear()
    for value in [*VALUES, *VALUES]:  # and again, where calls are remembered
        options = {argument: value}
        if loss == "linear_cross_entropy" and not hasattr(theirs, loss):
            pytest.skip("this torch has no linear_cross_entropy")
        if argument == "p" and type(value) in (int, bool) and not value:
            continue  # no norm is of degree 0
        expected = outcome(theirs, loss, options)
        with path():
            found = outcome(ours, loss, options)
        if isinstance(expected, Tensor):
            assert isinstance(found, Tensor), f"{value!r}: {found!r}"
            assert_close(found, expected, msg=lambda m, v=value: f"{v!r}: {m}")
        else:
            assert type(found) is type(expected), f"{value!r}: {expected!r} / {found!r}"
            assert str(found).startswith(f"{loss}: ") and argument in str(found), (
                f"{value!r}: {found!r}"
            )


@pytest.mark.parametrize("index", [np.int64(1), tensor(1)], ids=["numpy", "tensor"])
@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss"])
def test_index_of_another_kind_in_a_graph(loss: str, index: Any) -> None:
    torch._dynamo.reset()
    x = LOG_P.clone().requires_grad_()
    fast = torch.compile(getattr(ours, loss), backend="aot_eager", fullgraph=True)
    value = fast(x, Y, ignore_index=index)
    expected = getattr(theirs, loss)(LOG_P, Y, ignore_index=1)
    assert_close(value, expected)
    value.backward()
    assert x.grad is not None and x.grad[1].eq(0).all() and x.grad.any()


HEAD = {"input": X, "linear_weight": P, "target": Y}
PAIR = {"input": X, "linear_weight": P, "teacher_input": X, "teacher_weight": P, "target": Y}
OF_HEADS: list[tuple[str, dict[str, Any], type, tuple[str, ...]]] = [
    (
        "linear_cross_entropy",
        HEAD,
        float,
        ("label_smoothing", "z_loss", "softcap", "logit_scale", "denominator"),
    ),
    ("linear_cross_entropy", HEAD, int, ("ignore_index", "memory_budget")),
    ("linear_log_prob", HEAD, float, ("temperature", "softcap")),
    ("linear_log_prob", HEAD, int, ("ignore_index", "memory_budget")),
    ("linear_log_prob", HEAD, bool, ("statistics",)),
    (
        "linear_kl_div",
        PAIR,
        float,
        (
            "temperature",
            "beta",
            "soft_weight",
            "hard_weight",
            "softcap",
            "teacher_softcap",
            "denominator",
        ),
    ),
    ("linear_kl_div", PAIR, int, ("ignore_index", "memory_budget")),
]
TAKEN: dict[type, tuple[Any, list[Any]]] = {
    float: (0.5, [np.float32(0.5), np.float64(0.5), tensor(0.5), tensor(0.5, dtype=torch.float64)]),
    int: (2**20, [np.int64(2**20), np.uint32(2**20), tensor(2**20), tensor([2**20])]),
    bool: (True, []),
}
REFUSED: dict[type, list[Any]] = {
    float: [
        "0.5",
        b"0.5",
        [0.5],
        0.5j,
        np.array(0.5),
        fractions.Fraction(1, 2),
        decimal.Decimal("0.5"),
    ],
    int: ["1", 1.0, [1], True, np.float64(1), np.bool_(True), tensor(1.0), tensor(True)],
    bool: ["True", 1, 1.0, None, np.bool_(True), tensor(True)],
}


@pytest.mark.parametrize(
    ("function", "given", "kind", "argument"),
    [(f, given, kind, a) for f, given, kind, arguments in OF_HEADS for a in arguments],
    ids=[f"{f}-{a}" for f, _, _, arguments in OF_HEADS for a in arguments],
)
def test_arguments_of_heads(
    function: str, given: dict[str, Any], kind: type, argument: str
) -> None:
    call = getattr(ours, function)
    plain, alike = TAKEN[kind]
    expected = call(**given, **{argument: plain})
    for value in alike:
        assert same_bits(call(**given, **{argument: value}), expected), repr(value)
    for value in REFUSED[kind]:
        with pytest.raises(
            TypeError, match=f"{function}: argument '{argument}' must be {kind.__name__}"
        ):
            call(**given, **{argument: value})


@pytest.mark.parametrize("value", ["False", 1, 0, None], ids=repr)
def test_exact_grad_is_a_bool(value: Any) -> None:
    for exact in (False, True):
        ours.binary_cross_entropy(X, P, exact_grad=exact)
        with pytest.raises(TypeError, match="argument 'exact_grad' must be bool"):
            ours.binary_cross_entropy(X, P, exact_grad=value)


def test_a_number_that_learns_is_refused_by_name() -> None:
    learns = tensor(0.5, requires_grad=True)
    for loss, argument in ARGUMENTS:
        if argument in ("label_smoothing", "p", "eps") or (loss, argument) == (
            "triplet_margin_loss",
            "margin",
        ):
            with pytest.raises(
                TypeError, match=rf"'{argument}' must be float, .*gradient.*{argument}\.item\(\)"
            ):
                getattr(ours, loss)(*EXAMPLE[loss], **{argument: learns})


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1)


# A margin that learns


@pytest.mark.parametrize("path", [nullcontext, formula_path], ids=["kernel", "formula"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "distance",
    [None, manhattan, torch.nn.PairwiseDistance(p=1)],
    ids=["default", "function", "module"],
)
@pytest.mark.parametrize("swap", [False, True])
def test_margin_that_learns(
    distance: Any, shape: tuple[int, ...], swap: bool, reduction: str, path: Callable[[], Any]
) -> None:
    found = []
    for face, context in ((ours, path), (theirs, nullcontext)):
        tensors = [t.double().requires_grad_() for t in (X, P, X + 0.7)]
        margin = torch.full(shape, 1.5, dtype=torch.float64, requires_grad=True)
        with context():
            loss = face.triplet_margin_with_distance_loss(
                *tensors, distance_function=distance, margin=margin, swap=swap, reduction=reduction
            )
        grads = torch.autograd.grad(loss.sum(), (margin, *tensors))
        found.append((loss, *grads))
    assert all(g.abs().sum() > 0 for g in found[0])
    for a, e in zip(*found, strict=True):
        assert_close(a, e)


def test_margin_that_learns_in_a_module_and_a_transform() -> None:
    module = nn.TripletMarginWithDistanceLoss(margin=torch.nn.Parameter(tensor(0.5)))
    same = torch.nn.TripletMarginWithDistanceLoss(margin=torch.nn.Parameter(tensor(0.5)))
    for each in (module, same):
        each(*(t.clone().requires_grad_() for t in (X, X, X))).backward()
    assert_close(module.margin.grad, same.margin.grad)
    assert module.margin.grad == 1

    def of(face: Any) -> Callable[[Tensor], Tensor]:
        return lambda margin: face.triplet_margin_with_distance_loss(X, P, X, margin=margin)

    for transform in (torch.func.grad, torch.func.jacfwd):
        assert_close(transform(of(ours))(tensor(1.5)), transform(of(theirs))(tensor(1.5)))


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_margin_of_a_tensor_is_checked(margin: float) -> None:
    with pytest.raises(ValueError, match="margin must be greater than 0"):
        ours.triplet_margin_with_distance_loss(*TRIPLET, margin=tensor(margin, requires_grad=True))


def test_a_least_variance_that_is_a_tensor() -> None:
    """PyTorch clamps by it, and no gradient passes to it."""
    var = X.clone().requires_grad_()
    for eps in (tensor(0.3), tensor([0.3]), P, tensor(0.3, requires_grad=True), P.double()):
        found = ours.gaussian_nll_loss(X, Q, var, eps=eps)
        expected = theirs.gaussian_nll_loss(X, Q, var, eps=eps)
        assert_close(found, expected)
        assert_close(torch.autograd.grad(found, var), torch.autograd.grad(expected, var))
    with pytest.raises(RuntimeError, match="eps of shape"):
        ours.gaussian_nll_loss(X, Q, var, eps=torch.ones(3))
    with pytest.raises(ValueError, match="negative"):
        ours.gaussian_nll_loss(X, Q, -var, eps=P)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_what_has_no_dimension_yields_where_it_does_in_torch(reduction: str) -> None:
    one, many = torch.ones((), dtype=torch.float64), torch.ones(2)
    calls: list[Callable[[Any], Tensor]] = [
        lambda m: m.poisson_nll_loss(many.long(), one, log_input=False, reduction=reduction),
        lambda m: m.poisson_nll_loss(many.long(), one, reduction=reduction),
    ]
    with pytest.warns(UserWarning, match="target size"):
        for function in ("huber_loss", "mse_loss", "l1_loss"):

            def call(m: Any, function: str = function) -> Tensor:
                loss = getattr(m, function)
                return loss(one.float(), many.double(), weight=one, reduction=reduction)

            calls.append(call)
        for each in calls:
            assert each(ours).dtype is each(theirs).dtype


def test_the_adaptive_softmax_names_itself_where_types_differ() -> None:
    loss = nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2])
    with pytest.raises(RuntimeError, match=r"AdaptiveLogSoftmaxWithLoss: .*input\.float\(\)"):
        loss(X.double(), Y)
