"""Where results differ from PyTorch's on purpose: what it does and what we do, both shown."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor, tensor

import fusedloss as ours

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
    both gradients, whatever its input but NaN"""
    x, t = tensor([-INF, -1.0]), tensor([0.0, 0.0])
    assert theirs.kl_div(x, t, reduction="none").isnan().tolist() == [True, False]
    assert gradient(theirs.kl_div, x, t, by=1, reduction="sum").isnan().all()
    assert ours.kl_div(x, t, reduction="none").tolist() == [0, 0]
    assert gradient(ours.kl_div, x, t, by=1, reduction="sum").tolist() == [0, 0]
    log_t = torch.full((2,), -INF)
    assert theirs.kl_div(x, log_t, reduction="none", log_target=True).isnan().all()
    assert ours.kl_div(x, log_t, reduction="none", log_target=True).tolist() == [0, 0]
    for target, log_target in ((0.0, False), (-INF, True)):
        nans = tensor([NAN]), tensor([target])
        for library in (ours, theirs):
            assert library.kl_div(*nans, reduction="sum", log_target=log_target).isnan()


@deviation
def _() -> None:
    """`binary_cross_entropy_with_logits`: the gradient keeps its digits where a logit is right and
    sure"""
    x, t = tensor([20.0, 17.0]), tensor([1.0, 1.0])
    exact = -torch.sigmoid(-x.double()).float()
    name = "binary_cross_entropy_with_logits"
    assert gradient(getattr(theirs, name), x, t, reduction="sum").tolist() == [0, 0]
    torch.testing.assert_close(
        gradient(getattr(ours, name), x, t, reduction="sum"), exact, rtol=1e-6, atol=0
    )


@deviation
def _() -> None:
    """`binary_cross_entropy_with_logits`: the loss is 0 where the logit is infinite and right, and inf
    where it is partly right"""
    x, t = tensor([INF, -INF, -INF]), tensor([1.0, 0.0, 0.5])
    name = "binary_cross_entropy_with_logits"
    assert getattr(theirs, name)(x, t, reduction="none").isnan().all()
    assert getattr(ours, name)(x, t, reduction="none").tolist() == [0, 0, INF]


@deviation
def _() -> None:
    """`cross_entropy`: loss and gradient keep their digits where the target's class is near certain"""
    x = tensor([[20.0, 0.0, 0.0]])
    share = 2 * math.exp(-20)
    for target in (tensor([0]), tensor([[1.0, 0.0, 0.0]])):
        assert theirs.cross_entropy(x, target).item() == 0
        assert gradient(theirs.cross_entropy, x, target)[0, 0] == 0
        assert ours.cross_entropy(x, target).item() == pytest.approx(share, rel=1e-6)
        assert gradient(ours.cross_entropy, x, target)[0, 0].item() == pytest.approx(
            -share, rel=1e-6
        )


@deviation
def _() -> None:
    """`binary_cross_entropy(..., exact_grad=True)` and `BCELoss(exact_grad=True)`: the gradient by the
    input is not clamped"""
    x, t = tensor([1e-20, 1.0, 0.0, 1e-3]), tensor([1.0, 1.0, 0.0, 0.25])
    refuses(TypeError, theirs.binary_cross_entropy, x, t, exact_grad=True)
    clamped = gradient(ours.binary_cross_entropy, x, t, reduction="sum")
    assert clamped.equal(gradient(theirs.binary_cross_entropy, x, t, reduction="sum"))
    assert clamped[0] == -1e12
    exact = tensor([-1e20, -1.0, 1.0, (1e-3 - 0.25) / (1e-3 * 0.999)])
    for function in (
        ours.binary_cross_entropy,
        lambda *a, **k: ours.BCELoss(reduction="sum", **k)(*a),
    ):
        options = {} if function is not ours.binary_cross_entropy else {"reduction": "sum"}
        found = gradient(function, x, t, exact_grad=True, **options)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@deviation
def _() -> None:
    """`triplet_margin_loss`: powers of distances do not overflow"""
    a, b = torch.full((1, 4), 1e18), torch.zeros(1, 4)
    assert theirs.triplet_margin_loss(a, b, a, p=3) == INF
    assert ours.triplet_margin_loss(a, b, a, p=3).item() == pytest.approx(4 ** (1 / 3) * 1e18)


@deviation
def _() -> None:
    """`kl_div`, `triplet_margin_loss`, `mse_loss` in bfloat16 and float16: rounded once, from
    float32"""
    x = torch.linspace(-9, -1, 64, dtype=torch.bfloat16)
    t = torch.linspace(0.1, 0.9, 64, dtype=torch.bfloat16)
    once = ours.kl_div(x.float(), t.float(), reduction="none").bfloat16()
    assert ours.kl_div(x, t, reduction="none").equal(once)
    assert not theirs.kl_div(x, t, reduction="none").equal(once)


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
    """`mse_loss` and `l1_loss` with a weight, `gaussian_nll_loss` and
    `triplet_margin_with_distance_loss` give float32 under autocast"""
    x, y, z = torch.rand(3, 2, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for face, dtype in ((theirs, torch.bfloat16), (ours, torch.float32)):
            assert face.mse_loss(x, y, weight=z).dtype is dtype
            assert face.l1_loss(x, y, weight=z, reduction="none").dtype is dtype
            assert face.gaussian_nll_loss(x, y, z).dtype is dtype
            assert face.triplet_margin_with_distance_loss(x, y, z).dtype is dtype


@deviation
def _() -> None:
    """`cross_entropy` with probabilities: a class of probability or weight 0 counts for nothing,
    even where its logit is -inf"""
    x = tensor([[1.0, -INF]])
    assert theirs.cross_entropy(x, tensor([[1.0, 0.0]])).isnan()
    assert ours.cross_entropy(x, tensor([[1.0, 0.0]])).item() == 0
    assert gradient(theirs.cross_entropy, x, tensor([[1.0, 0.0]]), by=1)[0, 1] == INF
    assert gradient(ours.cross_entropy, x, tensor([[1.0, 0.0]]), by=1)[0, 1] == 0
    x, weight = tensor([[1.0, -INF, 2.0]]), tensor([1.0, 0.0, 1.0])
    options = {"weight": weight, "label_smoothing": 0.1}
    assert theirs.cross_entropy(x, tensor([0]), **options).isnan()
    assert ours.cross_entropy(x, tensor([0]), **options).isfinite()


@deviation
def _() -> None:
    """`cross_entropy` with an infinite probability: the gradient is the limit, and the loss inf or NaN"""
    x, q = tensor([[1.0, 2.0]]), tensor([[0.5, INF]])
    assert theirs.cross_entropy(x, q) == INF and ours.cross_entropy(x, q).isnan()
    assert theirs.cross_entropy(x.flip(1), q) == INF == ours.cross_entropy(x.flip(1), q)
    assert gradient(theirs.cross_entropy, x, q)[0, 1].isnan()
    assert gradient(ours.cross_entropy, x, q).tolist() == [[INF, -INF]]


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
    """`binary_cross_entropy_with_logits` with a `pos_weight` of uint8: 0 - 1 does not wrap around"""
    x, target = torch.tensor([2.0]), torch.tensor([0.5])
    weight = tensor([0], dtype=torch.uint8)
    for face, same in ((ours, True), (theirs, False)):
        loss = face.binary_cross_entropy_with_logits
        exact = loss(x, target, pos_weight=weight.float())
        assert torch.allclose(loss(x, target, pos_weight=weight), exact) is same


@deviation
def _() -> None:
    """`triplet_margin_loss`: a distance does not overflow where its powers would"""
    a, b, c = torch.full((3, 1, 4), 1e200, dtype=torch.float64) * tensor([[[1]], [[2]], [[3]]])
    assert theirs.triplet_margin_loss(a, b, c).isnan()
    assert ours.triplet_margin_loss(a, c, b).item() == pytest.approx(2e200, rel=1e-12)


@deviation
def _() -> None:
    """A bool tensor counts as 0 and 1"""
    x, y, t = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3) > 0
    refuses(RuntimeError, theirs.triplet_margin_loss, x, y, t)
    torch.testing.assert_close(
        ours.triplet_margin_loss(x, y, t), ours.triplet_margin_loss(x, y, t.float())
    )
    refuses(RuntimeError, theirs.mse_loss, x, t, weight=y)
    torch.testing.assert_close(ours.mse_loss(x, t, weight=y), ours.mse_loss(x, t.float(), weight=y))


@deviation
def _() -> None:
    """`triplet_margin_loss` with infinite coordinates: a loss of 0 has the gradient 0, and a NaN one no
    gradient that hides it"""
    a, b, c = tensor([[1.0]]), tensor([[2.0]]), tensor([[INF]])
    assert theirs.triplet_margin_loss(a, b, c) == ours.triplet_margin_loss(a, b, c) == 0
    assert gradient(theirs.triplet_margin_loss, a, b, c).isnan()
    assert gradient(ours.triplet_margin_loss, a, b, c) == 0
    assert gradient(theirs.triplet_margin_loss, c, b, c, p=1.0) == 0
    assert gradient(ours.triplet_margin_loss, c, b, c, p=1.0).isnan()


@deviation
def _() -> None:
    """`mse_loss` refuses complex tensors, with a weight too"""
    x = torch.randn(2, dtype=torch.complex64)
    theirs.mse_loss(x, x, weight=torch.rand(2))
    refuses(NotImplementedError, theirs.mse_loss, x, x)
    refuses(NotImplementedError, ours.mse_loss, x, x, weight=torch.rand(2))
    theirs.mse_loss(x.real, x.real, weight=x)
    refuses(NotImplementedError, ours.mse_loss, x.real, x.real, weight=x)


@deviation
def _() -> None:
    """`l1_loss` and `huber_loss` refuse a complex `weight`"""
    x, weight = torch.randn(2), torch.randn(2, dtype=torch.complex64)
    for name in ("l1_loss", "huber_loss"):
        assert getattr(theirs, name)(x, x, weight=weight).is_complex()
        refuses(NotImplementedError, getattr(ours, name), x, x, weight=weight)


@deviation
def _() -> None:
    """`poisson_nll_loss` with `full`: the gradient by a target that is infinite or not above 0 is the
    formula's"""
    x, t = tensor([0.5] * 4), tensor([0.0, -1.0, NAN, INF])
    options = {"full": True, "reduction": "sum"}
    assert gradient(theirs.poisson_nll_loss, x, t, by=1, **options).isnan().all()
    assert gradient(ours.poisson_nll_loss, x, t, by=1, **options).tolist() == [-0.5] * 3 + [INF]


@deviation
def _() -> None:
    """`soft_margin_loss`: value and gradient are finite for any finite score"""
    x, t = tensor([-1000.0, -100.0]), torch.ones(2)
    assert theirs.soft_margin_loss(x, t, reduction="none").tolist() == [INF, INF]
    assert gradient(theirs.soft_margin_loss, x, t, reduction="sum").isnan().all()
    assert ours.soft_margin_loss(x, t, reduction="none").tolist() == [1000, 100]
    assert gradient(ours.soft_margin_loss, x, t, reduction="sum").tolist() == [-1, -1]


@deviation
def _() -> None:
    """`soft_margin_loss` has a gradient by the target, and forward mode over its backward"""
    x, t = tensor([0.5, -1.0]), tensor([1.0, -1.0])
    refuses(RuntimeError, lambda: gradient(theirs.soft_margin_loss, x, t, by=1))
    found = gradient(ours.soft_margin_loss, x, t, by=1, reduction="sum")
    torch.testing.assert_close(found, -x * torch.sigmoid(-x * t))
    with warnings.catch_warnings(action="ignore"):
        refuses(NotImplementedError, torch.func.hessian(theirs.soft_margin_loss), x, t)
    assert torch.func.hessian(ours.soft_margin_loss)(x, t).isfinite().all()


@deviation
def _() -> None:
    """`soft_margin_loss`, `gaussian_nll_loss`, `binary_cross_entropy_with_logits`: no complex tensors"""
    x, y = torch.randn(2, dtype=torch.complex64), torch.rand(2)
    assert theirs.soft_margin_loss(x, y).is_complex()
    assert theirs.gaussian_nll_loss(x, y, y).is_complex()
    refuses(RuntimeError, ours.soft_margin_loss, x, y)
    refuses(NotImplementedError, ours.gaussian_nll_loss, x, y, y)
    assert theirs.binary_cross_entropy_with_logits(y, x).is_complex()
    refuses(RuntimeError, ours.binary_cross_entropy_with_logits, y, x)


@deviation
def _() -> None:
    """`hinge_embedding_loss`, `margin_ranking_loss`, `soft_margin_loss` of integers: nothing wraps
    around, and the margin keeps its fraction"""
    x, t = tensor([3], dtype=torch.uint8), tensor([2], dtype=torch.uint8)
    assert theirs.margin_ranking_loss(x, t, t) == 254
    assert ours.margin_ranking_loss(x, t, t) == 0
    assert gradient(theirs.soft_margin_loss, x.float() / 30, t) == -2
    assert gradient(ours.soft_margin_loss, x.float() / 30, t) > -1
    below, options = tensor([-3]), {"margin": -1.5, "reduction": "sum"}
    assert theirs.hinge_embedding_loss(below, tensor([-1]), **options) == 2
    assert ours.hinge_embedding_loss(below, tensor([-1]), **options) == 1


@deviation
def _() -> None:
    """`hinge_embedding_loss` of a target other than -1 and 1: the sum of both terms does not cancel"""
    x, t = tensor([-1e8]), tensor([0.5])
    assert theirs.hinge_embedding_loss(x, t) == 0
    assert ours.hinge_embedding_loss(x, t) == 1


@deviation
def _() -> None:
    """`gaussian_nll_loss`: no square overflows that the variance makes small again"""
    x, t, v = tensor([1e25]), tensor([0.0]), tensor([1e30])
    assert theirs.gaussian_nll_loss(x, t, v) == INF
    assert ours.gaussian_nll_loss(x, t, v).item() == pytest.approx(5e19, rel=1e-6)


@deviation
def _() -> None:
    """`gaussian_nll_loss` of no elements: the gradient by a variance that broadcasts is 0"""
    x, v, options = torch.zeros(0), tensor(0.0), {"eps": 0.0, "reduction": "sum"}
    assert gradient(theirs.gaussian_nll_loss, x, x, v, by=2, **options).isnan()
    assert gradient(ours.gaussian_nll_loss, x, x, v, by=2, **options) == 0


@deviation
def _() -> None:
    """`gaussian_nll_loss`: a variance may be any real number, and its gradient passes the clamp in forward
    mode too"""
    x, t, v = tensor([0.5]), tensor([1.0]), tensor([1e-9])
    refuses(TypeError, theirs.gaussian_nll_loss, x, t, 2)
    assert ours.gaussian_nll_loss(x, t, 2) == ours.gaussian_nll_loss(x, t, 2.0)
    for loss, forward in ((theirs.gaussian_nll_loss, 0.0), (ours.gaussian_nll_loss, -1.25e11)):
        assert gradient(loss, x, t, v, by=2).item() == pytest.approx(-1.25e11, rel=1e-4)
        along = torch.func.jvp(functools.partial(loss, x, t), (v,), (tensor([1.0]),))[1]
        assert along.item() == pytest.approx(forward, rel=1e-4)


@deviation
def _() -> None:
    """`binary_cross_entropy_with_logits` with an infinite target or `pos_weight`: the gradient is the
    formula's limit"""
    x, t, w = tensor([0.5]), tensor([0.5]), tensor([INF])
    assert gradient(theirs.binary_cross_entropy_with_logits, x, t, pos_weight=w).isnan()
    assert gradient(ours.binary_cross_entropy_with_logits, x, t, pos_weight=w) == -INF


@deviation
def _() -> None:
    """`nll_loss`: images of any layout have a gradient"""
    x = torch.randn(3, 3, 8, 1).movedim(2, 1)
    refuses(RuntimeError, lambda: gradient(theirs.nll_loss, x, torch.zeros(3, 3, 1).long()))
    assert gradient(ours.nll_loss, x, torch.zeros(3, 3, 1).long()).shape == x.shape


@deviation
def _() -> None:
    """`cross_entropy`, `nll_loss` of images without classes: any index is out of range"""
    x, target = torch.zeros(2, 0, 3), torch.zeros(2, 3).long()
    for name in ("cross_entropy", "nll_loss"):
        refuses(RuntimeError, getattr(theirs, name), x, target)
        refuses(IndexError, getattr(ours, name), x, target)


@deviation
def _() -> None:
    """Types are checked of empty tensors too"""
    x, target = torch.zeros(0, 3).byte(), torch.zeros(0, 3)
    assert theirs.cross_entropy(x, target).isnan()
    refuses(NotImplementedError, ours.cross_entropy, x, target)


@deviation
def _() -> None:
    """`kl_div` with a target that is infinite or subnormal: the gradient by it is the formula's"""
    x, t = tensor([-1.0] * 5).double(), tensor([5e-324] * 5, dtype=torch.float64)
    slope = (math.log(5e-324) + 2) / 5
    assert gradient(theirs.kl_div, x, t, by=1, reduction="batchmean")[0].item() != slope
    assert gradient(ours.kl_div, x, t, by=1, reduction="batchmean")[0].item() == pytest.approx(
        slope
    )
    t = tensor([INF] * 5)
    assert gradient(theirs.kl_div, x.float(), t, by=1, reduction="sum").isnan().all()
    assert gradient(ours.kl_div, x.float(), t, by=1, reduction="sum").isinf().all()
