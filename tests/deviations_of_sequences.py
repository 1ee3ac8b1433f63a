"""Deviations from PyTorch of CTC."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs
from deviations import INF, deviation, gradient, refuses
from torch import tensor

import fusedloss as ours

CTC = tensor([[1, 1], [2, 1]]), tensor([2, 4]), tensor([2, 2])  # the first has no alignment


@deviation
def _() -> None:
    """`ctc_loss`: the gradient by `log_probs` is that of the formula; after `log_softmax` it is the same"""
    x, labels = torch.randn(4, 1, 3).log_softmax(2), (tensor([[1, 2]]), tensor([4]), tensor([2]))
    added = gradient(theirs.ctc_loss, x, *labels) - gradient(ours.ctc_loss, x, *labels)
    torch.testing.assert_close(added, x.exp() / 2)
    found, expected = (
        gradient(lambda t: f(t.log_softmax(2), *labels), x)  # noqa: B023
        for f in (ours.ctc_loss, theirs.ctc_loss)
    )
    torch.testing.assert_close(found, expected)


@deviation
def _() -> None:
    """`ctc_loss` without an alignment has the gradient 0, and so has a class of log-probability
    -inf"""
    x = torch.randn(4, 2, 3).log_softmax(2)
    assert theirs.ctc_loss(x, *CTC, reduction="none")[0] == INF
    assert gradient(theirs.ctc_loss, x, *CTC)[:2, 0].isnan().all()
    assert ours.ctc_loss(x, *CTC, reduction="none")[0] == INF
    assert (gradient(ours.ctc_loss, x, *CTC)[:, 0] == 0).all()
    x = torch.randn(4, 2, 4).index_fill(2, tensor([3]), -INF)  # a class that is no label
    assert gradient(theirs.ctc_loss, x, *CTC)[:, 1, 3].isnan().all()
    assert (gradient(ours.ctc_loss, x, *CTC)[:, 1, 3] == 0).all()


@deviation
def _() -> None:
    """`ctc_loss` whose last label is the blank: the gradient is that of all alignments"""
    x, labels = (
        torch.randn(4, 1, 3).log_softmax(2).double(),
        (tensor([[1, 0]]), tensor([4]), tensor([2])),
    )
    step = torch.zeros_like(x)
    step[3, 0, 0] = 1e-6
    slope = (ours.ctc_loss(x + step, *labels) - ours.ctc_loss(x - step, *labels)) / 2e-6
    assert gradient(ours.ctc_loss, x, *labels)[3, 0, 0].item() == pytest.approx(slope.item())
    of_formula = gradient(theirs.ctc_loss, x, *labels)[3, 0, 0] - x[3, 0, 0].exp() / 2
    assert abs(of_formula - slope) > 1e-2


@deviation
def _() -> None:
    """`ctc_loss`: labels in one row may lie apart in memory"""
    x, lengths = torch.randn(3, 2, 4).log_softmax(2), (tensor([3, 3]), tensor([1, 1]))
    apart, dense = tensor([1, 2, 3, 3])[::2], tensor([1, 3])
    assert theirs.ctc_loss(x, apart, *lengths) != theirs.ctc_loss(x, dense, *lengths)
    assert ours.ctc_loss(x, apart, *lengths) == ours.ctc_loss(x, dense, *lengths)


@deviation
def _() -> None:
    """`ctc_loss`: a label out of range raises IndexError"""
    x, labels = torch.zeros(4, 2, 3), (tensor([[1, 3], [2, 1]]), tensor([3, 3]), tensor([2, 2]))
    assert theirs.ctc_loss(x, *labels).isfinite()  # what lies behind the row of x
    refuses(IndexError, ours.ctc_loss, x, *labels)


@deviation
def _() -> None:
    """`ctc_loss` takes half types on the CPU, and is differentiable twice and in forward mode"""
    x = torch.randn(4, 2, 3).log_softmax(2)
    for dtype in (torch.bfloat16, torch.float16):
        refuses(NotImplementedError, theirs.ctc_loss, x.to(dtype), *CTC)
        assert ours.ctc_loss(x.to(dtype), *CTC).dtype is dtype
    for library in (theirs, ours):
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(library.ctc_loss(leaf, *CTC), leaf, create_graph=True)[0]
        if library is theirs:
            refuses(RuntimeError, lambda: torch.autograd.grad(first[2:].sum(), leaf))  # noqa: B023
        else:
            torch.autograd.grad(first.sum(), leaf)
