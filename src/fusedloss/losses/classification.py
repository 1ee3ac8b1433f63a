"""Classification: cross entropy of logits, and the likelihood of log-probabilities."""

from __future__ import annotations

import torch

from ..front.classes import Classes, Counted
from ..front.definition import BenchCase, Bounds, normal, plain, row, uniform
from ..front.loss import loss
from ..front.settings import class_group, within
from ..front.strict import (
    input_is_log_probability,
    input_is_no_softmax,
    some_row_counts,
    target_is_distribution,
    target_is_number,
)


def index_example(shape, dtype, generator):
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(classes, shape[:1][: len(shape) - 1] + shape[2:], generator=generator)
    return 3 * normal(shape, dtype, generator), target


def _log_p_example(shape, dtype, generator):
    logits, target = index_example(shape, torch.float64, generator)
    return logits.log_softmax(0 if len(shape) == 1 else 1).to(dtype), target


def class_weight(tensors, generator):
    classes = tensors[0].shape[0] if tensors[0].dim() == 1 else tensors[0].shape[1]
    return uniform((classes,), tensors[0].dtype, generator, 0.1, 2)


def _soft_example(shape, dtype, generator):
    x = normal(shape, torch.float64, generator)
    q = normal(shape, torch.float64, generator).softmax(0 if len(shape) == 1 else 1)
    return (3 * x).to(dtype), q.to(dtype)


def an_ignored(tensors, generator):
    """An ignore_index that hits some rows."""
    return int(tensors[1].flatten()[0]) if tensors[1].numel() else 0


CASES = (
    BenchCase("CE 4096x1024", (4096, 1024), compiled=True, at_most={"clone()": 1.5}),
    BenchCase("CE 1024x32000", (1024, 32000), at_most={"clone()": 0.6}),
    BenchCase("CE 256x128256", (256, 128256), quick=False, at_most={"clone()": 0.6}),
    BenchCase(
        *("CE smoothing 1024x32000", (1024, 32000), "float32", "label_smoothing"),
        quick=False,
        beside="cross_entropy",
        at_most={"plain": 1.1},
    ),
    BenchCase("CE bf16 1024x32000", (1024, 32000), "bfloat16", at_most={"clone()": 1.0}),
    BenchCase("CE 8x21x256x256", (8, 21, 256, 256), at_most={"clone()": 1.0}),
    BenchCase(
        *("CE weight 1024x32000", (1024, 32000), "float32", "weight", "options"),
        beside="cross_entropy",
        at_most={"plain": 1.1},
    ),
    BenchCase(
        *(
            "CE ignore_index 1024x32000",
            (1024, 32000),
            "float32",
            "ignore_index",
            "options",
        ),
        beside="cross_entropy",
        at_most={"plain": 1.1},
    ),
    BenchCase("CE 8192x128256 bf16", (8192, 128256), "bfloat16", group="gpu", compiled=True),
    BenchCase("CE 32768x32768 bf16", (32768, 32768), "bfloat16", group="gpu", compiled=True),
    BenchCase("CE 16x21x512x512", (16, 21, 512, 512), group="gpu", compiled=True),
    BenchCase("CE 16x21x512x512 bf16", (16, 21, 512, 512), "bfloat16", group="gpu"),
    BenchCase("CE 8192x32000", (8192, 32000), group="gpu"),
    BenchCase("CE 8192x32000 bf16", (8192, 32000), "bfloat16", group="gpu"),
    BenchCase(
        *(
            "CE smoothing 8192x32000 bf16",
            (8192, 32000),
            "bfloat16",
            "label_smoothing",
            "gpu",
        ),
    ),
    BenchCase("CE 65536x1024", (65536, 1024), group="gpu"),
    BenchCase("CE 1048576x21", (1048576, 21), group="gpu"),
)
CASES_OF_PROBABILITIES = (
    BenchCase(
        *("CE probabilities 1024x32000", (1024, 32000), "float32", "plain", "options"),
        beside="cross_entropy",
        at_most={"plain": 1.6},
    ),
    BenchCase("CE probabilities 8192x32000 bf16", (8192, 32000), "bfloat16", group="gpu"),
)


@loss(
    "CrossEntropyLoss",
    Classes("log_softmax_lastdim_kernel_impl", softmax=True, soft=True),
    row(
        index_example,
        {
            "plain": plain,
            "weight": lambda t, g: {"weight": class_weight(t, g)},
            "ignore_index": lambda t, g: {"ignore_index": an_ignored(t, g)},
            "label_smoothing": lambda t, g: {"label_smoothing": 0.1},
            "all": lambda t, g: {
                "weight": class_weight(t, g),
                "ignore_index": an_ignored(t, g),
                "label_smoothing": 0.2,
            },
        },
        differentiable=(0,),
        indices=1,
        bench=CASES,
        # The formula's gradient is torch's, of log_softmax in the type computed in.
        bounds=Bounds(float32=(2, 3), float64=(8, 8), formula=(4, 64)),
    ),
    row(
        _soft_example,
        {
            "plain": plain,
            "weight": lambda t, g: {"weight": class_weight(t, g)},
            "label_smoothing": lambda t, g: {"label_smoothing": 0.1},
            "both": lambda t, g: {"weight": class_weight(t, g), "label_smoothing": 0.2},
        },
        variant="probabilities",
        bench=CASES_OF_PROBABILITIES,
        bounds=Bounds(float32=(2, 3), float64=(8, 128), formula=(8, 64), triton=(4, 16)),
    ),
    rules=(target_is_number, target_is_distribution, input_is_no_softmax, some_row_counts),
    label_smoothing=within(0.0, 1.0, RuntimeError, "Got: {value}"),
    class_group=class_group,
)
def cross_entropy(ignore_index, label_smoothing, class_group=None):
    r"""Cross entropy of the softmax of logits, against class indices or class probabilities.

    With q the target's probabilities (one-hot for an index), h the smoothing and C classes,

    .. math::
        \ell = -\sum_c w_c \left((1 - h)\, q_c + \frac{h}{C}\right) \log \mathrm{softmax}(x)_c

    As :func:`torch.nn.functional.cross_entropy`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html), but class indices may
    be of any integer type, a row that is ignored does not touch the others whatever it holds, and a
    class without probability contributes 0 even where its logit is -inf.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...).
        target: class indices, (), (N) or (N, d1, ...); or class probabilities, of the input's shape.
        weight: of each class, (C).
        ignore_index: rows with this target contribute nothing. Not for probabilities.
        reduction: 'none', 'sum' or 'mean'. 'mean' divides by the weights of the targets that are not
            ignored; for probabilities, by the number of rows.
        label_smoothing: h, in [0, 1].
        class_group: as in :func:`linear_cross_entropy`: the input holds the logits of this process's classes.

    Raises:
        RuntimeError: `ignore_index` with probabilities.
    """
    return Counted(ignore_index, label_smoothing)


@loss(
    "NLLLoss",
    Classes("nll_loss_out_frame"),
    row(
        _log_p_example,
        {
            "plain": plain,
            "weight": lambda t, g: {"weight": class_weight(t, g)},
            "ignore_index": lambda t, g: {"ignore_index": an_ignored(t, g)},
            "both": lambda t, g: {"weight": class_weight(t, g), "ignore_index": an_ignored(t, g)},
        },
        differentiable=(0,),
        indices=1,
        bench=(
            BenchCase("NLL 4096x1024", (4096, 1024), at_most={"eager": 1.0}),
            BenchCase("NLL 65536x1024", (65536, 1024), group="gpu"),
        ),
    ),
    rules=(input_is_log_probability, some_row_counts),
    class_group=class_group,
)
def nll_loss(ignore_index, class_group=None):
    r"""Negative log likelihood: :math:`\ell = -w_y\,x_y`, for class y of log-probabilities x.

    As :func:`torch.nn.functional.nll_loss`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html), but class indices may be of
    any integer type.

    Args:
        input: log-probabilities, (C), (N, C) or (N, C, d1, ...).
        target: class indices, (), (N) or (N, d1, ...).
        weight: of each class, (C).
        ignore_index: rows with this target contribute nothing.
        reduction: 'none', 'sum' or 'mean'. 'mean' divides by the weights of the targets that are not
            ignored.
        class_group: as in :func:`linear_cross_entropy`: the input holds the log-probabilities of this
            process's classes. A row's loss is that of the process that has its class, and their sum goes round.
    """
    return Counted(ignore_index)
