"""More of tests/deviations.py: of pairs of vectors, and of labels against the other classes."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as theirs
from deviations import INF, NAN, deviation, gradient, refuses
from torch import tensor

import fusedloss as ours

MARGINS = ("multi_margin_loss", "multilabel_margin_loss")


@deviation
def _() -> None:
    """`cosine_embedding_loss`: squares do not overflow, and products of integers do not wrap around"""
    x = torch.full((1, 4), 1e20)
    assert theirs.cosine_embedding_loss(x, x, tensor([1])).isnan()
    assert ours.cosine_embedding_loss(x, x, tensor([1])) == 0
    x = tensor([[100, 3]], dtype=torch.int8)
    exact = ours.cosine_embedding_loss(x.float(), x.float() + 1, tensor([1]))
    assert ours.cosine_embedding_loss(x, x + 1, tensor([1])) == exact
    assert theirs.cosine_embedding_loss(x, x + 1, tensor([1])) != exact


@deviation
def _() -> None:
    """`cosine_embedding_loss`: 1 - cos keeps its digits where the vectors are nearly parallel"""
    x = torch.linspace(1, 2, 64).reshape(1, 64)
    y = x * (1 + 1e-3 * torch.linspace(-1, 1, 64))
    exact = theirs.cosine_embedding_loss(x.double(), y.double(), tensor([1])).item()
    found = ours.cosine_embedding_loss(x, y, tensor([1])).item()
    assert found == pytest.approx(exact, rel=1e-6)
    assert theirs.cosine_embedding_loss(x, y, tensor([1])).item() != pytest.approx(exact, rel=0.01)


@deviation
def _() -> None:
    """`multi_margin_loss`, `multilabel_margin_loss`: NaN passes on"""
    x = tensor([[1.0, NAN, 2.0]])
    for name, target in zip(MARGINS, (tensor([0]), tensor([[0, -1, 0]])), strict=True):
        assert getattr(theirs, name)(x, target).isfinite()
        assert getattr(ours, name)(x, target).isnan()


@deviation
def _() -> None:
    """`multi_margin_loss`, `multilabel_margin_loss`: labels may be of any integer type, the input of half
    types on the CPU, and there is forward mode"""
    x = torch.randn(2, 3, dtype=torch.float64)
    for name, target in zip(
        MARGINS, (tensor([0, 1]), tensor([[0, -1, 0], [1, 2, -1]])), strict=True
    ):
        for given in ((x, target.int()), (x.half(), target), (x.bfloat16(), target)):
            refuses(RuntimeError, getattr(theirs, name), *given)
            assert getattr(ours, name)(*given).isfinite()
        for face in (ours, theirs):
            of_input = functools.partial(getattr(face, name), target=target)
            if face is theirs:
                refuses(RuntimeError, torch.func.jvp, of_input, (x,), (x,))
            else:
                assert torch.func.jvp(of_input, (x,), (x,))[1].isfinite()


@deviation
def _() -> None:
    """`multi_margin_loss`, `multilabel_margin_loss`: over no row 'mean' is NaN and 'sum' 0"""
    x = torch.zeros(0, 3)
    for name, target in zip(MARGINS, (torch.zeros(0), torch.zeros(0, 3)), strict=True):
        getattr(theirs, name)(x, target.long())  # memory that nothing was written to
        assert getattr(ours, name)(x, target.long()).isnan()
        assert getattr(ours, name)(x, target.long(), reduction="sum") == 0


@deviation
def _() -> None:
    """`multilabel_soft_margin_loss`: the loss is 0 where the logit is infinite and right, and the gradient
    keeps its digits where a logit is right and sure"""
    x, t = tensor([[INF, -INF]]), tensor([[1.0, 0.0]])
    assert theirs.multilabel_soft_margin_loss(x, t).isnan()
    assert ours.multilabel_soft_margin_loss(x, t) == 0
    x = tensor([[20.0]])
    found = gradient(ours.multilabel_soft_margin_loss, x, tensor([[1.0]])).item()
    assert found == pytest.approx(-math.exp(-20), rel=1e-6)


@deviation
def _() -> None:
    """`multilabel_soft_margin_loss`: a bool target counts as 0 and 1, and the result is float32 under
    autocast"""
    x, t = torch.randn(2, 3), torch.randn(2, 3) > 0
    refuses(RuntimeError, theirs.multilabel_soft_margin_loss, x, t)
    torch.testing.assert_close(
        ours.multilabel_soft_margin_loss(x, t), ours.multilabel_soft_margin_loss(x, t.float())
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = x.bfloat16(), t.bfloat16()
        assert theirs.multilabel_soft_margin_loss(*half).dtype is torch.bfloat16
        assert ours.multilabel_soft_margin_loss(*half).dtype is torch.float32
