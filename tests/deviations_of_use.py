"""Deviations from PyTorch in how a loss is called, not in what it gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as theirs
from deviations import deviation, refuses
from torch import tensor

import fusedloss as ours


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
    """With the reduction 'none' or in float16, logits, log-probabilities, triplets, what a weighted `mse_loss`
    takes and the target of `kl_div` with `log_target` raise if they are changed in place between the loss and
    `backward()`"""
    target = tensor([0, 1])
    for function, others, options in (
        (ours.cross_entropy, (target,), {"reduction": "none"}),
        (ours.triplet_margin_loss, (torch.randn(2, 3), torch.randn(2, 3)), {"reduction": "none"}),
    ):
        for library in (getattr(theirs, function.__name__), function):
            x = torch.randn(2, 3, requires_grad=True) * 1
            value = library(x, *others, **options).sum()
            with torch.no_grad():
                x.mul_(2)
            if library is function:
                refuses(RuntimeError, value.backward)
            else:
                value.backward()
    x, t = (torch.randn(2, 3, requires_grad=True) * 1 for _ in range(2))
    for value in (
        ours.mse_loss(x, t, reduction="none", weight=torch.ones(2, 3)),
        ours.kl_div(x, t, reduction="none", log_target=True),
    ):
        with torch.no_grad():
            t.mul_(2)
        refuses(RuntimeError, value.sum().backward)
    half = torch.randn(2, 3, dtype=torch.float16, requires_grad=True) * 1
    value = ours.cross_entropy(half, target)
    with torch.no_grad():
        half.mul_(2)
    refuses(RuntimeError, value.backward)


@deviation
def _() -> None:
    """After other losses inputs may be changed in place before `backward()`, but not if `create_graph=True`
    follows"""
    for library, allowed in ((theirs, False), (ours, True)):
        x = torch.randn(2, 3, requires_grad=True) * 1
        value = library.mse_loss(x, torch.zeros(2, 3))
        with torch.no_grad():
            x.mul_(2)
        if allowed:
            value.backward()
        else:
            refuses(RuntimeError, value.backward)
    for library, allowed in ((theirs, True), (ours, False)):
        leaf = torch.randn(2, 3, requires_grad=True)
        x = leaf * 1
        value = library.cross_entropy(x, tensor([0, 1]))
        with torch.no_grad():
            x.mul_(2)
        if allowed:
            torch.autograd.grad(value, leaf, create_graph=True)
        else:
            with pytest.raises(RuntimeError, match="cross_entropy: input was changed"):
                torch.autograd.grad(value, leaf, create_graph=True)


@deviation
def _() -> None:
    """Teachers, targets and weights made in inference mode are taken beside inputs that learn"""
    with torch.inference_mode():
        teacher = torch.rand(2, 3)
    x = torch.randn(2, 3, requires_grad=True)
    refuses(RuntimeError, theirs.mse_loss, x, teacher)
    ours.mse_loss(x, teacher).backward()


@deviation
def _() -> None:
    """A tensor whose storage was freed is refused by name"""
    x = torch.randn(2, 3)
    x.untyped_storage().resize_(0)  # PyTorch's own loss ends the process
    with pytest.raises(RuntimeError, match="mse_loss: the storage of target was freed"):
        ours.mse_loss(torch.zeros(2, 3), x)


@deviation
def _() -> None:
    """A class weight may require a gradient"""
    x, target, weight = torch.randn(2, 3), tensor([0, 1]), torch.rand(3, requires_grad=True)
    refuses(RuntimeError, lambda: theirs.cross_entropy(x, target, weight).backward())
    ours.cross_entropy(x, target, weight).backward()
    assert weight.grad is not None


@deviation
def _() -> None:
    """Messages of errors begin with the function's name, and say more"""
    x = torch.randn(2, 3)
    with pytest.raises(IndexError, match=r"^Target 5 is out of bounds"):
        theirs.cross_entropy(x, tensor([0, 5]))
    with pytest.raises(
        IndexError, match=r"^cross_entropy: target\[1\] = 5 .*Target 5 is out of bounds"
    ):
        ours.cross_entropy(x, tensor([0, 5]))


@deviation
def _() -> None:
    """Warnings begin with PyTorch's words, and are given at the user's line, beyond the frames of
    PyTorch's modules"""
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning) as told:
        torch.nn.MSELoss()(x, x[0])
        ours.nn.MSELoss()(x, x[0])
    their, our = told
    assert str(our.message).startswith(str(their.message))
    assert their.filename != __file__ == our.filename
