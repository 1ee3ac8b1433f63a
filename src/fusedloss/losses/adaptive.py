"""The adaptive softmax: a head of frequent classes and of clusters, which have heads of their own."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import advice, errors, torch_state
from ..front.modules import FACE, MODULES
from .heads import linear_log_prob

NAME = "AdaptiveLogSoftmaxWithLoss"


class AdaptiveLogSoftmaxWithLoss(nn.modules.AdaptiveLogSoftmaxWithLoss):
    r"""Log-probabilities of the targets under an adaptive softmax, and their mean, negated, as the loss.

    As :class:`torch.nn.AdaptiveLogSoftmaxWithLoss`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveLogSoftmaxWithLoss.html;
    https://arxiv.org/abs/1609.04309), whose constructor, parameters, `log_prob` and `predict` these are. The
    head and the clusters' heads are :func:`fusedloss.functional.linear_log_prob`: `forward` and its backward
    hold the logits of a chunk of rows alone. Where a head is no plain :class:`torch.nn.Linear` any more,
    PyTorch's own `forward` runs.

    Of the classes, those below the first of the `cutoffs` :math:`c_1 < \dots < c_K` are in the head, with
    weight :math:`W_0`, which gives each cluster one more logit; those from :math:`c_k` up to
    :math:`c_{k+1}` are in cluster :math:`k`, whose head :math:`W_k` has features of its own, :math:`P_k h`:

    .. math::
        \log p(y) = \begin{cases} \log \mathrm{softmax}(W_0 h)_y & \text{if } y < c_1 \\
        \log \mathrm{softmax}(W_0 h)_{c_1 + k - 1} + \log \mathrm{softmax}(W_k P_k h)_{y - c_k}
        & \text{if } c_k \le y < c_{k+1} \end{cases}

    The loss is the mean of :math:`-\log p(y)`. The head of a cluster that no target is in is not multiplied by,
    and its parameters receive no gradient.

    Args:
        in_features: D, the features of each row.
        n_classes: the number of classes, of which the frequent ones come first.
        cutoffs: the first class of each cluster, increasing, from 1 to `n_classes` - 1.
        div_value: what features are divided by from cluster to cluster: cluster k has D // `div_value` ** k.
        head_bias: whether the head has a bias; the clusters have none.
        device: of the parameters.
        dtype: of the parameters.
        input_: the features :math:`h`, (N, D) or (D).
        target_: class indices (N) or (), of any integer type.

    Returns:
        A named tuple: `output`, the log-probabilities in the target's shape, and `loss`, a scalar.

    Raises:
        ValueError: `cutoffs` that are empty, not increasing, or no classes.
        RuntimeError: shapes that do not fit; a target that is not of integers, or out of range (its position is
            named); an input of another dtype than the weights.
    """

    def forward(self, input_: Tensor, target_: Tensor) -> Any:
        tails: Any = self.tail
        heads = [self.head, *(output for _, output in tails)]
        if not all(map(_is_plain, heads)):
            return super().forward(input_, target_)
        _check(input_, target_)
        if input_.shape[-1] != self.in_features:
            words = f"input {list(input_.shape)} must have {self.in_features} features, in_features"
            errors.fail(RuntimeError, NAME, f"{words}: mat1 and mat2 shapes cannot be multiplied")
        if input_.dtype is not (own := self.head.weight.dtype) and not torch_state.any_autocast():
            words = f"input is of {input_.dtype}, the weights are of {own}: pass {advice.cast('input', own)}"
            errors.fail(RuntimeError, NAME, f"{words}: mat1 and mat2 must have the same dtype")
        batched = target_.dim() > 0
        rows = input_ if batched else input_.unsqueeze(0)
        target = (target_ if batched else target_.unsqueeze(0)).to(torch.int64)
        bad = (target < 0) | (target >= self.n_classes)
        if bad.any():
            self._refuse(target_, int(bad.nonzero()[0]))
        label, parts = target, []
        for k, cluster in enumerate(_clusters(target, self.cutoffs)):
            if cluster.places.numel():
                hidden = tails[k][0](rows.index_select(0, cluster.places))
                parts.append((cluster.places, _log_prob(tails[k][1], hidden, cluster.label)))
                label = label.index_fill(0, cluster.places, self.shortlist_size + k)
        log_p = _log_prob(self.head, rows, label)
        for places, inside in parts:
            log_p = log_p.index_add(0, places, inside)
        output = log_p.to(rows.dtype)
        loss = (-log_p).mean().to(rows.dtype)
        return torch_state.asm_output(output if batched else output.squeeze(0), loss)

    def _refuse(self, target: Tensor, at: int) -> None:
        where = errors.position(at, target.shape)
        low, high = target.min().item(), target.max().item()
        errors.fail(
            RuntimeError,
            NAME,
            f"target{where} = {target.flatten()[at].item()} is no class. Target values should be in "
            f"[0, {self.n_classes - 1}], but values in range [{low}, {high}] were found. ",
        )


class Cluster(NamedTuple):
    """Where the targets of a cluster are, and which of its classes they are."""

    places: Tensor
    label: Tensor


def _clusters(target: Tensor, cutoffs: list[int]) -> list[Cluster]:
    found = []
    for low, high in itertools.pairwise(cutoffs):
        places = ((target >= low) & (target < high)).nonzero().squeeze(1)
        found.append(Cluster(places, target.index_select(0, places) - low))
    return found


def _log_prob(head: nn.Linear, input: Tensor, label: Tensor) -> Tensor:
    # No class is ignored: an index below 0 has been refused.
    found = linear_log_prob(input, head.weight, label, linear_bias=head.bias, ignore_index=-1)
    assert isinstance(found, Tensor)
    return found


def _is_plain(head: nn.Module) -> bool:
    """Whether to call this is to multiply by its weight, and nothing else."""
    return (
        type(head).forward is nn.Linear.forward
        and "forward" not in head.__dict__
        and not torch_state.hooked(head)
    )


def _check(input: Tensor, target: Tensor) -> None:
    if target.dim() > 1:
        words = "0D or 1D target tensor expected, multi-target not supported, got target "
        errors.fail(RuntimeError, NAME, f"{words}{list(target.shape)}")
    if target.dim() == 1 and input.shape[:1] != target.shape:
        words = "Input and target should have the same size in the batch dimension. "
        errors.fail(
            RuntimeError, NAME, f"{words}input {list(input.shape)}, target {list(target.shape)}"
        )
    if input.dim() != target.dim() + 1:
        expected = f"{target.dim()}D target tensor expects {target.dim() + 1}D input tensors, "
        errors.fail(RuntimeError, NAME, f"{expected}but found inputs with size {input.size()}")
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        words = f"target must be of integers, got {target.dtype}: pass target.long()"
        errors.fail(RuntimeError, NAME, words)


AdaptiveLogSoftmaxWithLoss.__module__ = FACE
MODULES[NAME] = AdaptiveLogSoftmaxWithLoss
