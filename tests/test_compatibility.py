"""docs/compatibility.md: the table is that of the records, and each deviation exists."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as theirs
from records import LOSSES, counts
from records_summary import page_table
from torch import Tensor, tensor

import fusedloss as ours

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
INF, NAN = math.inf, math.nan

Function = Callable[..., Tensor]
deviations: dict[str, Callable[[], None]] = {}


def deviation(check: Callable[[], None]) -> Callable[[], None]:
    """What PyTorch does and what we do, both shown; named by its docstring, as on the page."""
    deviations[inspect.cleandoc(check.__doc__ or "").replace("\n", " ")] = check
    return check


def gradient(function: Function, *inputs: Tensor, by: int = 0, **options: object) -> Tensor:
    leaves = [t.detach().clone().requires_grad_(k == by) for k, t in enumerate(inputs)]
    return torch.autograd.grad(function(*leaves, **options).sum(), leaves[by])[0]


def refuses(kind: type[Exception], function: Function, *inputs: Tensor, **options: object) -> None:
    with pytest.raises(kind):
        function(*inputs, **options)


@deviation
def _() -> None:
    """`kl_div`: an element whose target probability is 0 counts for nothing, in the value and in
    both gradients, whatever its input"""
    x, t = tensor([-INF, -1.0, NAN]), tensor([0.0, 0.0, 0.0])
    assert theirs.kl_div(x, t, reduction="none").isnan().tolist() == [True, False, True]
    assert gradient(theirs.kl_div, x, t, by=1, reduction="sum").isnan().all()
    assert ours.kl_div(x, t, reduction="none").tolist() == [0, 0, 0]
    assert gradient(ours.kl_div, x, t, by=1, reduction="sum").tolist() == [0, 0, 0]
    log_t = torch.full((3,), -INF)
    assert theirs.kl_div(x, log_t, reduction="none", log_target=True).isnan().all()
    assert ours.kl_div(x, log_t, reduction="none", log_target=True).tolist() == [0, 0, 0]


@deviation
def _() -> None:
    """`binary_cross_entropy`: the gradient by the target is clamped like the value, to 100"""
    x, t = tensor([0.0, 1.0]), tensor([0.5, 0.5])
    assert gradient(theirs.binary_cross_entropy, x, t, by=1, reduction="sum").tolist() == [
        INF,
        -INF,
    ]
    assert gradient(ours.binary_cross_entropy, x, t, by=1, reduction="sum").tolist() == [100, -100]


@deviation
def _() -> None:
    """`binary_cross_entropy` runs under autocast on every device, in float32"""
    x, t = torch.rand(4), torch.rand(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.binary_cross_entropy(x.bfloat16(), t).dtype is torch.float32


@deviation
def _() -> None:
    """`mse_loss` with a weight and `triplet_margin_with_distance_loss` give float32 under
    autocast"""
    x, y, z = torch.rand(3, 2, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert theirs.mse_loss(x, y, weight=z).dtype is torch.bfloat16
        assert theirs.triplet_margin_with_distance_loss(x, y, z).dtype is torch.bfloat16
        assert ours.mse_loss(x, y, weight=z).dtype is torch.float32
        assert ours.triplet_margin_with_distance_loss(x, y, z).dtype is torch.float32


@deviation
def _() -> None:
    """`cross_entropy` with probabilities: a class of probability or weight 0 counts for nothing,
    even where its logit is -inf"""
    x = tensor([[1.0, -INF]])
    assert theirs.cross_entropy(x, tensor([[1.0, 0.0]])).isnan()
    assert ours.cross_entropy(x, tensor([[1.0, 0.0]])).item() == 0
    x, weight = tensor([[1.0, -INF, 2.0]]), tensor([1.0, 0.0, 1.0])
    options = {"weight": weight, "label_smoothing": 0.1}
    assert theirs.cross_entropy(x, tensor([0]), **options).isnan()
    assert ours.cross_entropy(x, tensor([0]), **options).isfinite()


@deviation
def _() -> None:
    """`cross_entropy`: an ignored row has the gradient 0, whatever it holds"""
    for value in (INF, NAN):
        x, target = tensor([[1.0, 2.0], [value, 1.0]]), tensor([0, -100])
        assert gradient(theirs.cross_entropy, x, target)[1].isnan().all()
        assert gradient(ours.cross_entropy, x, target)[1].tolist() == [0, 0]


@deviation
def _() -> None:
    """`cross_entropy`, `nll_loss`: class indices may be of any integer type"""
    x = torch.randn(2, 3)
    kinds = (torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)
    for name in ("cross_entropy", "nll_loss"):
        for kind in kinds:
            target = tensor([0, 2]).to(kind)
            refuses(RuntimeError, getattr(theirs, name), x, target)
            assert getattr(ours, name)(x, target) == getattr(ours, name)(x, target.long())


@deviation
def _() -> None:
    """`cross_entropy`: a `label_smoothing` below 0 or NaN is refused"""
    x, target = torch.randn(2, 3), tensor([0, 1])
    for smoothing in (-0.5, NAN):
        theirs.cross_entropy(x, target, label_smoothing=smoothing)
        refuses(RuntimeError, ours.cross_entropy, x, target, label_smoothing=smoothing)


@deviation
def _() -> None:
    """`cross_entropy` in float16: sums of many rows do not overflow"""
    x, target = torch.zeros(60_000, 8, dtype=torch.float16), torch.zeros(60_000, dtype=torch.long)
    assert theirs.cross_entropy(x, target).isinf()
    assert ours.cross_entropy(x, target).item() == pytest.approx(math.log(8), rel=1e-3)


@deviation
def _() -> None:
    """`triplet_margin_loss`: `p` must be above 0, and neither `p` nor `margin` NaN"""
    tensors = torch.randn(3, 2, 4)
    for options in ({"p": 0.0}, {"p": -1.0}, {"p": NAN}, {"margin": NAN}):
        theirs.triplet_margin_loss(*tensors, **options)
        refuses(ValueError, ours.triplet_margin_loss, *tensors, **options)


@deviation
def _() -> None:
    """`triplet_margin_loss` of unsigned integers: differences do not wrap around"""
    a, b, c = (tensor([[v]], dtype=torch.uint8) for v in (1, 3, 2))
    exact = ours.triplet_margin_loss(a.float(), b.float(), c.float())
    assert ours.triplet_margin_loss(a, b, c) == exact
    assert theirs.triplet_margin_loss(a, b, c) != exact


@deviation
def _() -> None:
    """`reduction='elementwise_mean'`, deprecated, is taken by every loss"""
    tensors = torch.randn(3, 2, 4)
    name = "triplet_margin_with_distance_loss"
    refuses(ValueError, getattr(theirs, name), *tensors, reduction="elementwise_mean")
    with pytest.warns(UserWarning, match="deprecated"):
        getattr(ours, name)(*tensors, reduction="elementwise_mean")


@deviation
def _() -> None:
    """A class weight may require a gradient"""
    x, target, weight = torch.randn(2, 3), tensor([0, 1]), torch.rand(3, requires_grad=True)
    refuses(RuntimeError, lambda: theirs.cross_entropy(x, target, weight).backward())
    ours.cross_entropy(x, target, weight).backward()
    assert weight.grad is not None


@deviation
def _() -> None:
    """Messages of errors and warnings begin with the function's name, and say more"""
    x = torch.randn(2, 3)
    with pytest.raises(IndexError, match=r"^Target 5 is out of bounds"):
        theirs.cross_entropy(x, tensor([0, 5]))
    with pytest.raises(
        IndexError, match=r"^cross_entropy: target\[1\] = 5 .*Target 5 is out of bounds"
    ):
        ours.cross_entropy(x, tensor([0, 5]))


@pytest.mark.parametrize("title", deviations)
def test_deviation_exists(title: str) -> None:
    deviations[title]()


def test_page_lists_the_deviations() -> None:
    section = PAGE.read_text().split("## Deviations")[1].split("\n## ")[0]
    head, *listed = re.findall(r"^\| (.+?) \| .+ \|$", section, re.MULTILINE)
    assert head == "what"
    assert sorted(listed) == sorted(deviations)


def test_page_counts_the_records() -> None:
    assert page_table(counts()) in PAGE.read_text(), "make it anew: pytest --write-records"


def test_modules_and_functions_are_all_there() -> None:
    for function, module in LOSSES.items():
        assert issubclass(getattr(ours.nn, module), getattr(torch.nn, module))
        assert callable(getattr(ours.functional, function))
