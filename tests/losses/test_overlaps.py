"""Losses of overlaps: the kernel, the formula and its derivatives, layouts, threads, edges, errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import (
    OVERLAPS,
    Case,
    assert_same_bits,
    check,
    draw_incoming,
    each_dtype,
    formula_path,
    run,
)
from shapes import assert_kernel
from test_kernels import LAYOUTS
from torch import Generator, Tensor
from torch.func import grad, vmap

import fusedloss
from fusedloss import dice_cross_entropy, dice_focal, dice_loss
from fusedloss.autograd import operators
from fusedloss.kinds.dice import DiceCall

SHAPES = [(5, 7), (2, 5, 3), (2, 5, 3, 4), (1, 3, 700), (2, 21, 33, 40), (0, 5), (2, 5, 0), (40, 3)]
each_case = pytest.mark.parametrize("case", OVERLAPS, ids=str)


def bound(case: Case, options: dict[str, Any], reduction: str) -> Callable[..., Tensor]:
    return functools.partial(case.function, **options, reduction=reduction)


@each_dtype
@each_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_formula(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> None:
    tensors, options = case.example(shape, dtype, generator)
    for options["reduction"] in case.reductions:
        with formula_path():
            value = case.function(*tensors, **options)
        assert_kernel(case, tensors, options)
        check(case, tensors, options, generator, draw_incoming(value, generator), 32)


@each_case
@pytest.mark.parametrize("path", ["kernel", "formula"])
def test_equals_what_users_write(case: Case, path: str, generator: Generator) -> None:
    for shape in ((5, 7), (2, 5, 3, 4), (2, 5, 33, 40)):
        tensors, options = case.example(shape, torch.float64, generator)
        for options["reduction"] in case.reductions:
            theirs = run(case.loss.torch_function, tensors, options, case.loss.differentiable)
            if path == "formula":
                with formula_path():
                    ours = run(case.function, tensors, options, case.loss.differentiable)
            else:
                ours = run(case.function, tensors, options, case.loss.differentiable)
            for (_, a), (_, e) in zip(ours.named(), theirs.named(), strict=True):
                torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case: Case, layout: Callable[[Tensor], Tensor], generator: Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors, options = case.example((2, 5, 6, 12), dtype, generator)
        options = {k: layout(v) if isinstance(v, Tensor) else v for k, v in options.items()}
        tensors = tuple(map(layout, tensors))
        for options["reduction"] in case.reductions:
            assert_kernel(case, tensors, options)
            check(case, tensors, options, generator, roundings=32)


@each_case
def test_threads_do_not_change_a_bit(case: Case, generator: Generator) -> None:
    for shape in ((5, 3, 90, 90), (1, 3, 150, 90)):
        tensors, options = case.example(shape, torch.float32, generator)
        for options["reduction"] in case.reductions:
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(case.function, tensors, options, (0,)))
            torch.set_num_threads(1)
            for each in found[1:]:
                assert_same_bits(each, found[0])


@each_case
def test_a_repeated_call_gives_the_same_bits(case: Case, generator: Generator) -> None:
    tensors, options = case.example((2, 5, 6, 7), torch.float32, generator)
    found = [run(case.function, tensors, options, (0,)) for _ in range(4)]
    for each in found[1:]:
        assert_same_bits(each, found[0])


@each_case
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_types_of_the_target(case: Case, dtype: torch.dtype, generator: Generator) -> None:
    tensors, options = case.example((2, 5, 6, 7), torch.float32, generator)
    if case.loss.indices is not None and dtype in (torch.bool, torch.float16):
        pytest.skip("class indices are integers")
    target = tensors[1].to(dtype)
    expected = run(case.function, tensors, options, (0,))
    assert_same_bits(run(case.function, (tensors[0], target), options, (0,)), expected)


# Derivatives, transforms, compilers


@each_case
def test_derivatives(case: Case, generator: Generator) -> None:
    """First by the kernel, first and second by the formula, in both modes."""
    tensors, options = case.example((2, 3, 4), torch.float64, generator)
    x = tensors[0].requires_grad_()
    for reduction in case.reductions:
        function = bound(case, options, reduction)
        assert torch.autograd.gradcheck(
            lambda x, f=function: f(x, tensors[1]), x, check_forward_ad=True
        )
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, tensors[1]), x)


@each_case
def test_vmap_is_a_loop(case: Case, generator: Generator) -> None:
    batches = [case.example((2, 3, 4), torch.float64, generator) for _ in range(3)]
    options = batches[0][1]
    stacked = [torch.stack(each) for each in zip(*(tensors for tensors, _ in batches), strict=True)]
    for reduction in case.reductions:
        function = bound(case, options, reduction)
        torch.testing.assert_close(
            vmap(function)(*stacked), torch.stack([function(*t) for t, _ in batches])
        )
    function = bound(case, options, "mean")
    torch.testing.assert_close(
        vmap(grad(function))(*stacked), torch.stack([grad(function)(*t) for t, _ in batches])
    )


@each_case
def test_compile_and_export(case: Case, generator: Generator) -> None:
    tensors, options = case.example((2, 5, 3, 4), torch.float32, generator)
    for reduction in case.reductions:
        function = bound(case, options, reduction)
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        expected = run(function, tensors, {}, (0,))
        for (_, a), (_, e) in zip(
            run(compiled, tensors, {}, (0,)).named(), expected.named(), strict=True
        ):
            torch.testing.assert_close(a, e)

    class Wrapped(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return function(*tensors)

    program = torch.export.export(Wrapped(), tensors)
    torch.testing.assert_close(program.module()(*tensors), function(*tensors))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_operators(reduction: str, generator: Generator) -> None:
    x = torch.randn(2, 3, 4, generator=generator).requires_grad_()
    y = torch.randint(3, (2, 4), generator=generator)
    call = DiceCall(
        loss="dice_loss",
        activation="softmax",
        masks=False,
        batch=False,
        background=True,
        weighting="none",
        skip_absent=False,
        ignore_index=-100,
        alpha=0.5,
        beta=0.5,
        smooth_nr=0.1,
        smooth_dr=0.1,
        by_overlap=1.0,
        by_rows=0.0,
        gamma=0.0,
        reduction=reduction,
        dtype=torch.float32,
    )
    settings = operators.settings(call)
    stored = [call.stores_gradients]
    torch.library.opcheck(operators.operator("dice"), (x, y, None, stored, *settings))
    (value,) = operators.run(call, (x, y, None))
    given = [torch.ones_like(value).detach()], [True], [True], x.detach(), y, None, *settings
    torch.library.opcheck(operators.operator("dice_backward"), given)


@each_case
def test_autocast_fake_and_meta(case: Case, generator: Generator) -> None:
    tensors, options = case.example((2, 5, 3, 4), torch.bfloat16, generator)
    if options.get("weight") is None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert case.function(*tensors, **options).dtype is torch.float32
    meta = tuple(t.to("meta") for t in tensors)
    options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in options.items()}
    for reduction in case.reductions:
        value = case.function(*meta, **{**options, "reduction": reduction})
        assert value.device.type == "meta" and value.dtype is torch.bfloat16


# What it is at the edges


@pytest.mark.parametrize("path", ["kernel", "formula"])
@pytest.mark.parametrize("overlap", ["dice", "jaccard", "tversky"])
def test_an_empty_mask_is_never_nan(path: str, overlap: str) -> None:
    """Neither in the target nor predicted: 0; predicted somewhere: 1 without smooth terms."""
    x = torch.tensor([[[50.0, 50.0], [-math.inf, -math.inf], [0.0, 0.0]]], requires_grad=True)
    y = torch.zeros(1, 2, dtype=torch.long)
    settings = {"overlap": overlap, "smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": "none"}
    with formula_path() if path == "formula" else pytest.MonkeyPatch.context():
        losses = dice_loss(x, y, **settings)
        (slope,) = torch.autograd.grad(losses.sum(), x)
        skipped = dice_loss(x, y, **settings, skip_absent=True)
        nothing = dice_loss(x, torch.full_like(y, -100), **settings)
    assert losses[0, 1:].tolist() == [0.0, 1.0] and 0 < losses[0, 0] < 1e-20
    assert slope.isfinite().all()
    assert skipped[0, 1:].tolist() == [0.0, 0.0]
    assert nothing.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", ["square", "simple", "uniform"])
def test_generalized_without_any_mask(kind: str) -> None:
    x = torch.zeros(2, 3, 4, requires_grad=True)
    mask = torch.zeros(2, 3, 4)
    value = dice_loss(x, mask, activation="sigmoid", generalized=kind)
    (slope,) = torch.autograd.grad(value, x)
    assert value.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("kind", ["square", "simple", "uniform"])
@pytest.mark.parametrize("batch", [False, True])
def test_generalized_has_the_gradient_by_its_masks(
    kind: str, batch: bool, generator: Generator
) -> None:
    """The weights of the classes are made of the masks, and are differentiated as well."""
    x = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 3, 4).requires_grad_()
    mask = torch.rand(2, 3, 4, dtype=torch.float64, generator=generator)
    mask[:, 1] = 0.0  # a class without a mask weighs as much as the most that another does

    def loss(x: Tensor, some: Tensor) -> Tensor:
        masks = torch.stack([some[:, 0], mask[:, 1], some[:, 1]], 1)
        return dice_loss(x, masks, generalized=kind, batch=batch)

    given = x, mask[:, ::2].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_near_perfect_overlap_keeps_its_digits(dtype: torch.dtype) -> None:
    y = torch.arange(6).reshape(1, 6) % 3
    x = 40 * torch.nn.functional.one_hot(y, 3).movedim(-1, 1).to(dtype)
    missed = 2 * 2 * math.exp(-40) / (1 + 2 * math.exp(-40))  # of each class; as much is wrong
    exact = missed / 2
    found = dice_loss(x, y, smooth_nr=0.0, smooth_dr=0.0, reduction="none")
    torch.testing.assert_close(found, torch.full((1, 3), exact, dtype=dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gap", [10.0, 30.0])
@pytest.mark.parametrize("kind", ["indices", "masks", "sigmoid"])
def test_a_class_that_is_certain_and_wrong_keeps_its_digits(
    kind: str, gap: float, generator: Generator
) -> None:
    """Against float64, of which 1 - p has digits still; slopes that are near each other take some."""
    y = torch.randint(4, (2, 9), generator=generator)
    one_hot = torch.nn.functional.one_hot(y, 4).movedim(-1, 1)
    wrong = torch.arange(9) % 2 == 0  # where no place is right, the slopes are far apart
    certain = torch.where(wrong, one_hot.roll(1, 1), one_hot)
    x = torch.randn(2, 4, 9, generator=generator) + gap * certain
    target = y if kind == "indices" else one_hot
    settings: dict[str, Any] = {"smooth_nr": 0.0, "reduction": "sum", "overlap": "jaccard"}
    settings["activation"] = "sigmoid" if kind == "sigmoid" else "softmax"
    found = run(dice_loss, (x, target), settings, (0,))
    with formula_path():
        expected = run(dice_loss, (x.double(), target), settings, (0,))
    torch.testing.assert_close(found.grads[0].double(), expected.grads[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("ignore_index", [0, 1, 255])
def test_any_class_may_be_ignored(activation: str, ignore_index: int, generator: Generator) -> None:
    x = torch.rand(2, 3, 8, generator=generator)
    y = torch.randint(3, (2, 8), generator=generator)
    y[:, :2] = ignore_index
    x[:, :, :2] = math.nan
    settings = {"activation": activation, "ignore_index": ignore_index}
    found = run(dice_loss, (x, y), settings, (0,))
    with formula_path():
        expected = run(dice_loss, (x, y), settings, (0,))
    assert expected.value.isfinite()
    for (_, a), (_, e) in zip(found.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, e)


def test_what_an_ignored_place_holds_does_not_count(generator: Generator) -> None:
    x = torch.randn(2, 4, 9, generator=generator)
    y = torch.randint(4, (2, 9), generator=generator)
    y[:, ::3] = 255
    spoiled = x.clone()
    spoiled[:, :, ::3] = math.nan
    kept = [k for k in range(9) if k % 3]
    for function in (dice_loss, dice_cross_entropy, dice_focal):
        for path in (formula_path(), pytest.MonkeyPatch.context()):
            with path:
                found = run(function, (spoiled, y), {"ignore_index": 255}, (0,))
                expected = run(function, (x[:, :, kept], y[:, kept]), {}, (0,))
            torch.testing.assert_close(found.value, expected.value)
            torch.testing.assert_close(found.grads[0][:, :, kept], expected.grads[0])
            assert (found.grads[0][:, :, ::3] == 0).all()


def test_masks_have_elements_that_are_ignored(generator: Generator) -> None:
    x = torch.randn(2, 3, 8, generator=generator)
    mask = (torch.rand(2, 3, 8, generator=generator) > 0.5).float()
    mask[:, :, :2] = 255
    for activation in ("sigmoid", "none"):
        p = x.sigmoid() if activation == "none" else x
        settings = {"activation": activation, "ignore_index": 255}
        expected = dice_loss(p[:, :, 2:], mask[:, :, 2:], activation=activation)
        torch.testing.assert_close(dice_loss(p, mask, **settings), expected)


def test_parts_add_up(generator: Generator) -> None:
    x = torch.randn(2, 5, 6, 7, generator=generator)
    y = torch.randint(5, (2, 6, 7), generator=generator)
    dice, ce = dice_loss(x, y), fusedloss.cross_entropy(x, y)
    focal = fusedloss.softmax_focal_loss(x, y, gamma=1.5)
    torch.testing.assert_close(dice_cross_entropy(x, y, lambda_dice=0.3), 0.3 * dice + ce)
    torch.testing.assert_close(dice_cross_entropy(x, y, lambda_ce=0.0), dice)
    torch.testing.assert_close(dice_focal(x, y, gamma=1.5, lambda_focal=2.0), dice + 2 * focal)


X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)
SEVEN = 7 * torch.nn.functional.one_hot(torch.tensor([-1 % 8, 2]), 8)[:, :4]
REFUSED: list[tuple[type[Exception], str, Callable[[], Tensor]]] = [
    (ValueError, r"overlap must be one of 'dice', .* got 'iou'", lambda: dice_loss(X, Y, overlap="iou")),
    (ValueError, r"activation must be one of", lambda: dice_loss(X, Y, activation="relu")),
    (ValueError, r"alpha must be finite and at least 0, got -1", lambda: dice_loss(X, Y, alpha=-1)),
    (ValueError, r"smooth_dr must be finite", lambda: dice_loss(X, Y, smooth_dr=math.nan)),
    (TypeError, r"argument 'batch' must be bool", lambda: dice_loss(X, Y, batch=1)),
    (ValueError, r"input must be \(N, C, ...\), got shape \[3\]", lambda: dice_loss(X[0, :, 0], Y)),
    (IndexError, r"target\[1, 2\] = 7 is out of range", lambda: dice_loss(X, Y + SEVEN)),
    (ValueError, r"leaves none", lambda: dice_loss(X[:, :1], Y, include_background=False)),
    (RuntimeError, r"weight tensor should be defined", lambda: dice_loss(X, Y, torch.ones(2))),
    (RuntimeError, r"Expected target size", lambda: dice_loss(X, Y[:, :3])),
    (ValueError, r"of one image pass input.unsqueeze\(0\)", lambda: dice_loss(X[0], Y[0])),
    (RuntimeError, r"expected target dtype", lambda: dice_loss(X, Y.float())),
    (RuntimeError, r"masks of torch.complex64", lambda: dice_loss(X, X.to(torch.complex64))),
    (NotImplementedError, r"dice_loss", lambda: dice_loss(X.long(), Y)),
    (ValueError, r"none is not a valid value for reduction", lambda: dice_focal(X, Y, reduction="none")),
    (RuntimeError, r"Expected target size", lambda: dice_focal(X, X)),
    (ValueError, r"lambda_ce must be", lambda: dice_cross_entropy(X, Y, lambda_ce=-1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "words", "call"), REFUSED, ids=[words for _, words, _ in REFUSED])
def test_refused(kind: type[Exception], words: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(kind, match=words) as caught:
        call()
    assert str(caught.value).startswith(("dice_loss: ", "dice_focal: ", "dice_cross_entropy: "))
