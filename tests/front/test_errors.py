"""Bad input: PyTorch's exception type, a message that helps, and nothing written."""

# ruff: noqa: E501 - a row of the table is a line

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from conftest import formula_path, name_of, same_bits
from torch import Generator, Tensor, tensor

from fusedloss import functional, nn
from fusedloss.front.definition import REGISTRY

MODULES = {loss.name: loss.module for loss in REGISTRY.values()}

X = torch.linspace(0.05, 0.95, 12).reshape(3, 4)
P = X.flip(0)
Y = tensor([0, 1, 2])
X3, Y3 = X.reshape(1, 4, 3), tensor([[0, 1, 2]])
INTEGERS = torch.ones(3, 4, dtype=torch.int64)
COMPLEX = X.to(torch.complex64)
META = X.to("meta")
NAN = float("nan")


def planted(whole: Tensor, at: tuple[int, int], value: float) -> Tensor:
    return whole.index_put(tuple(map(tensor, at)), tensor(value))


class Bad(NamedTuple):
    """A call, what it raises, and what its message says after the function's name."""

    function: str
    what: str
    kind: type[Exception]
    message: str
    tensors: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    torch_accepts: bool = False  # and we refuse on purpose


CE, NLL, MSE, KL = "cross_entropy", "nll_loss", "mse_loss", "kl_div"
BCE, LOGITS = "binary_cross_entropy", "binary_cross_entropy_with_logits"
TRIPLET, DISTANCE = "triplet_margin_loss", "triplet_margin_with_distance_loss"
EXAMPLE = {
    CE: (X, Y),
    NLL: (X, Y),
    MSE: (X, P),
    KL: (X, P),
    BCE: (X, P),
    LOGITS: (X, P),
    TRIPLET: (X, P, X + 1),
    DISTANCE: (X, P, X + 1),
}
BROADCAST = "4.* must match .*5.* at non-singleton dimension 1"

# fmt: off
TABLE = [
    # class indices
    Bad(CE, "index too large", IndexError, r"target\[2\] = 4 is out of range for 4 classes \(ignore_index = -100\)", (X, tensor([0, 1, 4]))),
    Bad(CE, "index negative", IndexError, r"target\[1\] = -1 is out of range for 4 classes \(ignore_index = 2\)", (X, tensor([0, -1, 2])), {"ignore_index": 2}),
    Bad(CE, "index in space", IndexError, r"target\[0, 1\] = 9 is out of range for 4 classes", (X3, tensor([[3, 9, 0]]))),
    Bad(CE, "index of one row", IndexError, r"target = 4 is out of range for 4 classes", (X[0], tensor(4))),
    Bad(CE, "byte index", IndexError, r"target\[2\] = 255 is out of range for 4 classes", (X, tensor([0, 1, 255], dtype=torch.uint8))),
    Bad(NLL, "index too large", IndexError, r"target\[0\] = 7 is out of range for 4 classes \(ignore_index = -100\)", (X, tensor([7, 1, 2]))),
    Bad(NLL, "index negative", IndexError, r"target\[2\] = -100 is out of range for 4 classes \(ignore_index = 0\)", (X, tensor([0, 1, -100])), {"ignore_index": 0}),
    Bad(NLL, "index in space", IndexError, r"target\[0, 2\] = 4 is out of range", (X3, tensor([[3, 0, 4]]))),
    Bad(CE, "float indices", RuntimeError, r"target .*torch.float32.*class indices are integers.*\[3, 4\]", (X, Y.float())),
    Bad(NLL, "float indices", RuntimeError, r"target .*torch.float32.*class indices are integers", (X, Y.float())),
    Bad(CE, "bool indices", RuntimeError, r"target .*torch.bool.*class indices are integers", (X, Y > 0)),
    Bad(CE, "integer probabilities", RuntimeError, r"target .*torch.int64.*\[3, 4\] holds probabilities", (X, INTEGERS)),
    Bad(CE, "two columns of indices", RuntimeError, r"input \[3, 4\] needs a target \[3\], got \[3, 1\]", (X, Y[:, None])),
    Bad(NLL, "two columns of indices", RuntimeError, r"input \[3, 4\] needs a target \[3\], got \[3, 1\]", (X, Y[:, None])),
    Bad(CE, "another batch", ValueError, r"input batch_size \(3\) to match target batch_size \(2\): input \[3, 4\], target \[2\]", (X, Y[:2])),
    Bad(NLL, "another batch", ValueError, r"input batch_size \(3\) to match target batch_size \(2\): input \[3, 4\], target \[2\]", (X, Y[:2])),
    Bad(CE, "another place", RuntimeError, r"input: \[1, 4, 3\], target: \[1, 2\]\)\. Expected target size \[1, 3\]", (X3, Y3[:, :2])),
    Bad(NLL, "another place", RuntimeError, r"input: \[1, 4, 3\], target: \[1, 2\]\)\. Expected target size \[1, 3\]", (X3, Y3[:, :2])),
    Bad(CE, "two indices of one row", ValueError, r"target size: 2", (X[0], Y[:2])),
    Bad(NLL, "no class dimension", ValueError, r"Expected 1 or more dimensions \(got 0\): input is \(C\)", (X[0, 0], Y[0])),
    Bad(CE, "no class dimension", RuntimeError, r"target .*torch.int64", (X[0, 0], Y[0])),
    *(Bad(f, "another batch, multi-target", ValueError, r"batch_size \(3\) to match target batch_size \(2\)", (X, torch.zeros(2, 4, dtype=torch.long))) for f in (CE, NLL)),
    *(Bad(f, "no batch, no target dimension", IndexError, r"batch_size \(0\) to match target batch_size \(none\)", (X[:0], Y[0])) for f in (CE, NLL)),
    # settings of the classes
    Bad(CE, "weight too short", RuntimeError, r"weight .* all 4 classes .* \[3\]", (X, Y), {"weight": torch.ones(3)}),
    Bad(CE, "weight with two dimensions", RuntimeError, r"weight .* all 4 classes .* \[1, 4\]", (X, Y), {"weight": torch.ones(1, 4)}),
    Bad(CE, "weight too short for probabilities", RuntimeError, r"weight .* all 4 classes .* \[3\]", (X, P), {"weight": torch.ones(3)}),
    Bad(NLL, "weight too long", RuntimeError, r"weight .* all 4 classes .* \[5\]", (X, Y), {"weight": torch.ones(5)}),
    Bad(CE, "weight of another type", RuntimeError, r"Float but found Double for weight", (X, Y), {"weight": torch.ones(4).double()}),
    Bad(NLL, "weight of another type", RuntimeError, r"Float but found Double for weight", (X, Y), {"weight": torch.ones(4).double()}),
    Bad(CE, "label_smoothing above 1", RuntimeError, r"label_smoothing must be between 0\.0 and 1\.0\. Got: 1\.5", (X, Y), {"label_smoothing": 1.5}),
    Bad(CE, "label_smoothing below 0", RuntimeError, r"label_smoothing must be between 0\.0 and 1\.0\. Got: -0\.1", (X, Y), {"label_smoothing": -0.1}, True),
    Bad(CE, "label_smoothing is NaN", RuntimeError, r"label_smoothing must be between 0\.0 and 1\.0\. Got: nan", (X, P), {"label_smoothing": NAN}, True),
    Bad(CE, "ignore_index with probabilities", RuntimeError, r"ignore_index = 1", (X, P), {"ignore_index": 1}),
    Bad(CE, "ignore_index is no integer", TypeError, r"ignore_index.*(float|1\.5)", (X, Y), {"ignore_index": 1.5}),
    # shapes
    Bad(MSE, "shapes", RuntimeError, rf"input \[3, 4\] and target \[3, 5\].*{BROADCAST}", (X, torch.ones(3, 5))),
    Bad(MSE, "weight of another shape", ValueError, r"weight has shape \[4\], input \[3, 4\]", (X, P), {"weight": torch.ones(4)}),
    Bad(BCE, "shapes", ValueError, r"target size \(torch\.Size\(\[2, 4\]\)\) .* input size \(torch\.Size\(\[3, 4\]\)\)", (X, P[:2])),
    Bad(BCE, "shapes that broadcast", ValueError, r"target size \(torch\.Size\(\[4\]\)\) .* input size \(torch\.Size\(\[3, 4\]\)\)", (X, P[0])),
    Bad(BCE, "weight", RuntimeError, r"weight of shape \[3\] .* \[3, 4\]", (X, P), {"weight": torch.ones(3)}),
    Bad(BCE, "weight that enlarges", RuntimeError, r"weight of shape \[2, 3, 4\] .* \[3, 4\]", (X, P), {"weight": torch.ones(2, 3, 4)}),
    Bad(LOGITS, "shapes", ValueError, r"Target size \(torch\.Size\(\[2, 4\]\)\) .* input size \(torch\.Size\(\[3, 4\]\)\)", (X, P[:2])),
    Bad(LOGITS, "weight", RuntimeError, r"weight of shape \[3\] .* \[3, 4\]", (X, P), {"weight": torch.ones(3)}),
    Bad(LOGITS, "pos_weight", RuntimeError, r"pos_weight of shape \[3\] .* \[3, 4\]", (X, P), {"pos_weight": torch.ones(3)}),
    Bad(LOGITS, "pos_weight that enlarges", RuntimeError, r"pos_weight of shape \[2, 3, 4\] .* \[3, 4\]", (X, P), {"pos_weight": torch.ones(2, 3, 4)}),
    Bad(KL, "shapes", RuntimeError, rf"input \[3, 4\] and target \[3, 5\].*{BROADCAST}", (X, torch.ones(3, 5))),
    Bad(TRIPLET, "shapes", RuntimeError, rf"anchor \[3, 4\] and positive \[3, 4\] and negative \[3, 5\].*{BROADCAST}", (X, P, torch.ones(3, 5))),
    Bad(DISTANCE, "shapes", RuntimeError, rf"anchor \[3, 4\] and positive \[3, 4\] and negative \[3, 5\].*{BROADCAST}", (X, P, torch.ones(3, 5))),
    Bad(TRIPLET, "dimensions", RuntimeError, r"same number of dimensions.*anchor 2D, positive 2D, and negative 1D", (X, P, X[0])),
    Bad(DISTANCE, "dimensions", RuntimeError, r"same number of dimensions.*anchor 1D, positive 2D, and negative 2D", (X[0], P, X)),
    # types
    Bad(CE, "complex", NotImplementedError, r"input .*torch\.complex64", (COMPLEX, Y)),
    Bad(CE, "integer", NotImplementedError, r"input .*torch\.int64", (INTEGERS, Y)),
    Bad(NLL, "complex", NotImplementedError, r"input .*torch\.complex64", (COMPLEX, Y)),
    Bad(NLL, "integer", NotImplementedError, r"input .*torch\.int64", (INTEGERS, Y)),
    Bad(MSE, "complex", NotImplementedError, r"input .*torch\.complex64", (COMPLEX, COMPLEX)),
    Bad("huber_loss", "complex", NotImplementedError, r"input .*torch\.complex64", (COMPLEX, X)),
    Bad("l1_loss", "bool", RuntimeError, r"target is of torch\.bool: pass target\.float\(\): Subtraction", (INTEGERS, X > 0)),
    Bad("smooth_l1_loss", "bools", RuntimeError, r"input is of torch\.bool: pass input\.float\(\): Subtraction", (X > 0, X > 0), {"beta": 0}),
    Bad("poisson_nll_loss", "bools", RuntimeError, r"input is of torch\.bool: pass input\.float\(\): Subtraction", (X > 0, X > 0), {"log_input": False}),
    Bad("l1_loss", "mean of integers", RuntimeError, r"the losses are of torch\.int64, .*pass input\.float\(\): mean\(\): could not infer", (INTEGERS, INTEGERS)),
    Bad("hinge_embedding_loss", "mean of integers", RuntimeError, r"the losses are of torch\.int64, .*pass input\.float\(\): mean\(\)", (INTEGERS, INTEGERS)),
    Bad(MSE, "complex target", NotImplementedError, r"target .*torch\.complex64", (X, COMPLEX)),
    Bad(MSE, "integer", NotImplementedError, r"input .*torch\.int64", (INTEGERS, INTEGERS)),
    Bad(BCE, "complex", NotImplementedError, r"input .*torch\.complex64", (COMPLEX, COMPLEX)),
    Bad(BCE, "integer", NotImplementedError, r"input .*torch\.int64", (INTEGERS, INTEGERS)),
    Bad(BCE, "target of another type", RuntimeError, r"torch\.float64 .* torch\.float32 for target", (X, P.double())),
    Bad(BCE, "integer target", RuntimeError, r"torch\.int64 .* torch\.float32 for target", (X, INTEGERS)),
    Bad(LOGITS, "complex", NotImplementedError, r"input .*torch\.complex64", (COMPLEX, P)),
    Bad(LOGITS, "integer", NotImplementedError, r"input .*torch\.int64", (INTEGERS, P)),
    Bad(LOGITS, "integer target", RuntimeError, r"target .*torch\.int64", (X, INTEGERS)),
    Bad(LOGITS, "complex target", RuntimeError, r"target .*torch\.complex64", (X, COMPLEX)),
    Bad(KL, "complex", RuntimeError, r"Complex inputs not supported: input is torch\.complex64", (COMPLEX, P)),
    Bad(KL, "integer", RuntimeError, r"Integral inputs not supported: input is torch\.int64", (INTEGERS, P)),
    Bad(KL, "integer target", RuntimeError, r"Integral inputs not supported: target is torch\.int64", (X, INTEGERS)),
    Bad(MSE, "no tensor", AttributeError, r"'target' must be Tensor, not list", (X, [1.0])),
    Bad(CE, "no tensor", TypeError, r"'target' must be Tensor, not NoneType", (X, None)),
    Bad(NLL, "no tensor", TypeError, r"'input' must be Tensor, not float", (1.0, Y)),
    Bad(BCE, "no tensor", AttributeError, r"'target' must be Tensor, not NoneType", (X, None)),
    Bad(LOGITS, "no tensor", AttributeError, r"'input' must be Tensor, not NoneType", (None, P)),
    Bad(KL, "no tensor", TypeError, r"'target' must be Tensor, not NoneType", (X, None)),
    Bad(TRIPLET, "no tensor", TypeError, r"'negative' must be Tensor, not NoneType", (X, P, None)),
    Bad(CE, "weight is no tensor", TypeError, r"'weight' must be Tensor, not list", (X, Y), {"weight": [1.0] * 4}),
    Bad(LOGITS, "pos_weight is no tensor", TypeError, r"'pos_weight' must be Tensor, not float", (X, P), {"pos_weight": 2.0}),
    # values
    Bad(BCE, "input above 1", RuntimeError, r"input should be between 0 and 1, but input\[1, 2\] = 1\.5.*with_logits", (planted(X, (1, 2), 1.5), P)),
    Bad(BCE, "input below 0", RuntimeError, r"input should be between 0 and 1, but input\[0, 0\] = -0\.5", (planted(X, (0, 0), -0.5), P)),
    Bad(BCE, "input is NaN", RuntimeError, r"input should be between 0 and 1, but input\[2, 3\] = nan", (planted(X, (2, 3), NAN), P)),
    Bad(BCE, "target above 1", RuntimeError, r"target should be between 0 and 1, but target\[0, 1\] = 2", (X, planted(P, (0, 1), 2.0))),
    Bad(BCE, "target is NaN", RuntimeError, r"target should be between 0 and 1, but target\[0, 1\] = nan", (X, planted(P, (0, 1), NAN))),
    Bad(TRIPLET, "margin is 0", ValueError, r"margin .* greater than 0, got 0", EXAMPLE[TRIPLET], {"margin": 0}),
    Bad(TRIPLET, "margin below 0", ValueError, r"margin .* greater than 0, got -1\.5", EXAMPLE[TRIPLET], {"margin": -1.5}),
    Bad(DISTANCE, "margin below 0", ValueError, r"margin .* greater than 0, got -1\.5", EXAMPLE[DISTANCE], {"margin": -1.5}),
    Bad(TRIPLET, "p is 0", ValueError, r"p must be greater than 0, got 0", EXAMPLE[TRIPLET], {"p": 0}, True),
    Bad(TRIPLET, "p below 0", ValueError, r"p must be greater than 0, got -2\.0", EXAMPLE[TRIPLET], {"p": -2.0}, True),
    Bad(TRIPLET, "p is NaN", ValueError, r"p must be greater than 0, got nan", EXAMPLE[TRIPLET], {"p": NAN}, True),
    Bad(TRIPLET, "inf norm of nothing", RuntimeError, r"cannot compute the inf norm on the last dimension", (X[:, :0], P[:, :0], X[:, :0]), {"p": float("inf")}),
    Bad(BCE, "complex weight", RuntimeError, r"weight must be real floating point, got torch\.complex64", (X, P), {"weight": COMPLEX}),
    Bad(LOGITS, "complex weight", RuntimeError, r"weight must be real floating point, got torch\.complex64", (X, P), {"weight": COMPLEX}),
    Bad(LOGITS, "complex pos_weight", RuntimeError, r"weight must be real floating point, got torch\.complex64", (X, P), {"pos_weight": COMPLEX}),
    # devices
    Bad(CE, "input elsewhere", RuntimeError, r"target is on cpu, input on meta", (META, Y)),
    Bad(CE, "weight elsewhere", RuntimeError, r"weight is on meta, input on cpu", (X, Y), {"weight": META[0]}),
    Bad(NLL, "target elsewhere", RuntimeError, r"target is on meta, input on cpu", (X, Y.to("meta"))),
    Bad(MSE, "weight elsewhere", RuntimeError, r"weight is on meta, input on cpu", (X, P), {"weight": META}),
    Bad(BCE, "weight elsewhere", RuntimeError, r"weight is on meta, input on cpu", (X, P), {"weight": META}),
    Bad(LOGITS, "pos_weight elsewhere", RuntimeError, r"pos_weight is on meta, input on cpu", (X, P), {"pos_weight": META}),
    Bad(TRIPLET, "negative elsewhere", RuntimeError, r"negative is on meta, anchor on cpu", (X, P, META)),
    Bad(DISTANCE, "positive elsewhere", RuntimeError, r"positive is on meta, anchor on cpu", (X, META, P)),
    *(Bad(f, "target elsewhere", RuntimeError, r"target is on meta, input on cpu", (X, META)) for f in (MSE, BCE, LOGITS, KL)),
    # the reduction
    *(Bad(f, "unknown reduction", ValueError, r"avg is not a valid value for reduction; expected .*'mean'", t, {"reduction": "avg"}) for f, t in EXAMPLE.items()),
    *(Bad(f, "reduction None", ValueError, r"None is not a valid value for reduction", t, {"reduction": None}) for f, t in EXAMPLE.items()),
    *(Bad(f, "reduction of kl_div alone", ValueError, r"batchmean is not a valid value for reduction", t, {"reduction": "batchmean"}) for f, t in EXAMPLE.items() if f != KL),
]
# fmt: on


def by_function(face: Any, bad: Bad, tensors: tuple[Any, ...]) -> Tensor:
    return getattr(face, bad.function)(*tensors, **bad.options)


def by_module(face: Any, bad: Bad, tensors: tuple[Any, ...]) -> Tensor:
    return getattr(face, MODULES[bad.function])(**bad.options)(*tensors)


DOORS = [
    pytest.param(by_function, functional, torch.nn.functional, nullcontext, id="function"),
    pytest.param(by_function, functional, torch.nn.functional, formula_path, id="formula"),
    pytest.param(by_module, nn, torch.nn, nullcontext, id="module"),
]


def with_gradients(bad: Bad) -> tuple[Any, ...]:
    return tuple(
        t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t
        for t in bad.tensors
    )


def opens(door: Callable[..., Tensor], bad: Bad) -> bool:
    return not (door is by_module and bad.function == MSE and "weight" in bad.options)


@pytest.mark.parametrize(
    ("bad", "door", "ours", "theirs", "path"),
    [
        pytest.param(bad, *door.values, id=f"{bad.function}: {bad.what}-{door.id}")
        for bad in TABLE
        for door in DOORS
        if opens(door.values[0], bad)
    ],
)
def test_refuses(
    bad: Bad,
    door: Callable[..., Tensor],
    ours: Any,
    theirs: Any,
    path: Callable[[], Any],
) -> None:
    tensors = with_gradients(bad)
    given = [t for t in (*tensors, *bad.options.values()) if isinstance(t, Tensor)]
    before = [t.detach().clone() for t in given]
    with path(), pytest.raises(bad.kind) as caught:
        door(ours, bad, tensors)
    for argument, copy in zip(given, before, strict=True):
        assert argument.grad is None
        assert argument.is_meta or same_bits(argument.detach(), copy)
    if door is by_function or constructs(bad):
        message = str(caught.value)
        assert message.startswith(f"{bad.function}: ")
        assert re.search(bad.message, message), message
    # Whoever catches PyTorch's exception must catch ours.
    with warnings.catch_warnings(), nullcontext() if bad.torch_accepts else pytest.raises(bad.kind):
        warnings.simplefilter("ignore")
        door(theirs, bad, tensors)


def constructs(bad: Bad) -> bool:
    """Whether PyTorch's own constructor lets the options pass."""
    try:
        getattr(torch.nn, MODULES[bad.function])(**bad.options)
    except bad.kind:
        return False
    return True


BROADCASTS = [
    ((3, 1), (3,), "target.reshape(input.shape)"),
    ((3,), (3, 1), "target.reshape(input.shape)"),
    ((3, 4), (4,), "expand"),
]


@pytest.mark.parametrize(("shape", "other", "fix"), BROADCASTS, ids=str)
@pytest.mark.parametrize("door", [functional.mse_loss, nn.MSELoss()], ids=["function", "module"])
def test_mse_warns_when_it_broadcasts(
    door: Callable[..., Tensor], shape: tuple[int, ...], other: tuple[int, ...], fix: str
) -> None:
    x, t = torch.rand(shape), torch.rand(other)
    with pytest.warns(UserWarning) as caught:
        value = door(x, t)
    with pytest.warns(UserWarning, match="Using a target size") as told:
        expected = torch.nn.functional.mse_loss(x, t)
    torch.testing.assert_close(value, expected)
    (message,) = {str(w.message) for w in caught}
    assert len(caught) == 1
    assert all(f"torch.Size({list(s)})" in message for s in (shape, other))
    assert fix in message and message.startswith(f"{told[0].message} mse_loss: ")


def test_mse_does_not_warn_of_equal_shapes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.mse_loss(X, P)


INDEX_TYPES = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("path", [nullcontext, formula_path], ids=["kernel", "formula"])
@pytest.mark.parametrize("dtype", INDEX_TYPES, ids=name_of)
@pytest.mark.parametrize("function", [CE, NLL])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 4, 70)], ids=str)
def test_class_indices_of_any_integer_type(
    function: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    path: Callable[[], Any],
    generator: Generator,
) -> None:
    x = torch.randn(shape, generator=generator).requires_grad_()
    target = torch.randint(4, shape[:1][: len(shape) - 1] + shape[2:], generator=generator)
    expected = getattr(functional, function)(x, target, ignore_index=3)
    with path():
        value = getattr(functional, function)(x, target.to(dtype), ignore_index=3)
    torch.testing.assert_close(value, expected, equal_nan=True)
    value.backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with pytest.raises(IndexError, match=r"target.* = 4 is out of range for 4 classes"):
        getattr(functional, function)(x, torch.full_like(target, 4).to(dtype))


@pytest.mark.parametrize("function", [CE, NLL])
def test_unsigned_64_bit_index_beyond_int64(function: str) -> None:
    target = tensor([0, 1, 2**63 + 5], dtype=torch.uint64)
    with pytest.raises(IndexError, match=r"target\[2\] = 9223372036854775813 is out of range"):
        getattr(functional, function)(X, target)


@pytest.mark.parametrize("loss", [CE, KL, TRIPLET])
def test_sparse_targets_are_made_dense_and_inputs_refused(loss: str) -> None:
    ours = getattr(functional, loss)
    x, t, *rest = (X, P, X + 1)[: 3 if loss == TRIPLET else 2]
    with formula_path():
        expected = ours(x, t, *rest)
    assert same_bits(ours(x, t.to_sparse(), *rest), expected)
    with pytest.raises(
        NotImplementedError, match=rf"{loss}: (input|anchor) has layout torch\.sparse_coo"
    ):
        ours(x.to_sparse(), t, *rest)
