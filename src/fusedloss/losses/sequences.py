"""Sequences whose labels are fewer than their frames, and stand nobody knows where."""

from __future__ import annotations

import torch

from ..front.definition import BenchCase, Bounds, normal, row
from ..front.loss import loss
from ..front.sequences import Sequences

FRAMES, MOST = 9, 50
CASES = (
    BenchCase("CTC 32x80x500", (32, 80, 500), at_most={"eager": 0.33}),
    BenchCase("CTC 32x5000x500", (32, 5000, 500), group="beyond"),
    BenchCase("CTC 256x80x500", (256, 80, 500), group="gpu"),
)


def _example(shape, dtype, generator):
    """Of (N, C), (C), or (N, C, T): sequences of several lengths, most with repeated labels."""
    alone = len(shape) == 1
    n, classes, frames = (*((1, *shape) if alone else shape), FRAMES)[:3]
    x = normal((frames, n, classes), torch.float64, generator).log_softmax(2).to(dtype)
    most = min(frames // 3, MOST) if classes > 1 else 0
    targets = torch.randint(1, max(classes - 1, 2), (n, most), generator=generator)
    counts = (torch.randperm(n, generator=generator) + most) % (most + 1)
    inputs = torch.randint(max(2 * most, 1), frames + 1, (n,), generator=generator)
    if frames > 3 * MOST:  # what is timed
        counts.fill_(most)
        inputs.fill_(frames)
    if alone:
        return x[:, 0], targets[0], inputs, counts
    return x, targets, inputs, counts


def _in_one_row(shape, dtype, generator):
    x, targets, inputs, counts = _example(shape, dtype, generator)
    if targets.dim() == 2:
        targets = targets[torch.arange(targets.shape[1]) < counts.unsqueeze(1)]
    return x, targets, inputs, counts


def _blank(tensors, generator):
    """The last class, which is no label of the examples."""
    classes = tensors[0].shape[-1]
    return classes - 1 if classes > 2 else 0


@loss(
    "CTCLoss",
    Sequences("ctc_loss_cpu"),
    row(
        _example,
        {
            "plain": lambda t, g: {},
            "blank": lambda t, g: {"blank": _blank(t, g)},
            "zero_infinity": lambda t, g: {"zero_infinity": True},
        },
        differentiable=(0,),
        indices=1,
        bench=CASES,
        # The gradient is a product of all frames, and the formula's an exp of their sum.
        bounds=Bounds(float64=(8, 64), formula=(8, 1024)),
    ),
    row(
        _in_one_row,
        differentiable=(0,),
        indices=1,
        whole=(1,),
        variant="in one row",
        bench=(
            BenchCase(
                *("CTC 32x80x500, targets in one row", (32, 80, 500)),
                group="options",
                beside="ctc_loss",
            ),
        ),
        bounds=Bounds(float64=(8, 64), formula=(8, 1024)),
    ),
)
def ctc_loss(blank, zero_infinity):
    r"""Connectionist temporal classification: minus the logarithm of the probability of the labels.

    That is the sum over all alignments of the labels y with the frames of a sequence, which are paths of a
    class or blank a frame that give y where repeats are joined and then blanks dropped:

    .. math::
        \ell = -\log \sum_{\pi \to y} \prod_t \exp x_{t, \pi_t}

    (Graves et al. 2006, https://www.cs.toronto.edu/~graves/icml_2006.pdf). As
    :func:`torch.nn.functional.ctc_loss`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html), but the gradient is that of the
    formula: minus the share of the alignments that have this class in this frame. PyTorch adds exp(x), which
    is for x that come of log_softmax, and vanishes in its backward. Where there is no alignment the loss is
    inf, or 0 with `zero_infinity`, and the gradient 0: never NaN. Also in half types, and differentiable
    any number of times.

    Args:
        log_probs: x, (T, N, C), or (T, C) of one sequence.
        targets: labels, (N, S), of which the first of each row count, or those of all sequences one behind
            the other.
        input_lengths: how many frames of each sequence count, (N) or a list.
        target_lengths: how many labels each sequence has, (N) or a list.
        blank: its class.
        reduction: 'none', 'mean' or 'sum'. 'mean' divides each loss by the number of its labels, if any, and
            then by N.
        zero_infinity: a sequence without an alignment has the loss 0, not inf.
    """
    return blank, zero_infinity
