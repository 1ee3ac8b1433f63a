"""Losses of a linear head, whose logits never exist as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import errors, sharded
from ..front.definition import Bounds, normal, row, uniform
from ..front.definition import plain as no_options
from ..front.head import RAISES, Head, check_tensors, finite, index, reduction_of, scalar, setting
from ..front.heads import Heads
from ..front.loss import loss
from ..front.settings import boolean, within
from ..kinds.heads import LinearCall
from . import composed

CLASSES = 6  # of the examples


def _of_indices(shape, dtype, generator):
    target = torch.randint(CLASSES, shape[:-1], generator=generator)
    return *of_states(shape, dtype, generator), target


def _of_probabilities(shape, dtype, generator):
    target = normal((*shape[:-1], CLASSES), torch.float64, generator).softmax(-1)
    return *of_states(shape, dtype, generator), target.to(dtype)


def of_states(shape, dtype, generator):
    size = max(shape[-1], 1) ** 0.5
    weight = 2 * normal((CLASSES, shape[-1]), torch.float64, generator) / size
    return normal(shape, dtype, generator), weight.to(dtype)


def biased(t, g, **settings):
    return {"linear_bias": normal((CLASSES,), t[0].dtype, g), **settings}


def of_rows(t, g):
    return uniform(tuple(t[0].shape[:-1]), t[0].dtype, g, 0.5, 1.5)


def ignored(target):
    """An ignore_index that hits some rows, but not all."""
    found = target.unique()
    return int(found[0]) if len(found) > 1 else -100


HEADS = Heads("in the input's type (float32 under autocast)", RAISES, check_tensors)


@loss(
    None,
    HEADS,
    row(
        _of_indices,
        {
            "plain": no_options,
            "all": lambda t, g: biased(
                *(t, g),
                weight=uniform((CLASSES,), t[0].dtype, g, 0.1, 2),
                ignore_index=ignored(t[2]),
                label_smoothing=0.2,
                sample_weight=of_rows(t, g),
                z_loss=0.01,
                softcap=3.0,
                logit_scale=-1.5,
            ),
        },
        kind="heads",
        indices=2,
        whole=(1,),
        learned=("linear_bias",),
        composed=composed.linear_cross_entropy,
    ),
    row(
        _of_probabilities,
        {"all": lambda t, g: biased(t, g, label_smoothing=0.2, z_loss=0.01)},
        differentiable=(0, 1, 2),
        kind="heads",
        variant="probabilities",
        # The gradient by the target of a certain class is log(1 + others) of what rounds to 1.
        bounds=Bounds(float32=(2, 3e5), float64=(2, 2e14), formula=(2, 8)),
        triton=False,
        whole=(1,),
        learned=("linear_bias",),
        composed=composed.linear_cross_entropy,
    ),
    label_smoothing=within(0.0, 1.0, RuntimeError, "Got: {value}"),
    exact_logits=boolean,
)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: Tensor | float | None = None,
    logit_scale: Tensor | float = 1.0,
    denominator: Tensor | float | None = None,
    memory_budget: int | None = None,
    exact_logits: bool = False,
    class_group: Any = None,
) -> Tensor:
    r"""Cross entropy of a linear head's logits, which never exist as a whole.

    With logits :math:`x = s\,(h W^T + b)`, capped to :math:`x = k \tanh(x / k)` where `softcap` k is given, and
    the rest as in :func:`cross_entropy`, the loss of a row is

    .. math::
        \ell = v \left(\mathrm{cross\_entropy}(x, y) + z\,\mathrm{logsumexp}(x)^2\right)

    As :func:`torch.nn.functional.linear_cross_entropy`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.LinearCrossEntropyLoss.html) and everything from
    `sample_weight` on. A chunk of rows has its logits at a time, so memory does not grow with rows times
    classes. Products are of the inputs' type and sum in float32 (float64 for float64); the softmax and the
    sum of the weight's gradient over chunks are of float32, and a gradient is rounded once. A gradient
    that nobody needs is not computed, and rows that do not count take part in no product.

    With `create_graph=True`, under `torch.func` and in forward mode the logits exist in full.

    Args:
        input: h, (..., D).
        linear_weight: W, (C, D), or (C, d1, ..., D) for K-dimensional losses.
        target: class indices, (...) or (..., d1, ...); or class probabilities, (..., C, d1, ...).
        linear_bias: b, (C) or (C, d1, ...).
        weight: of each class, (C).
        reduction: 'none', 'sum' or 'mean'. 'mean' divides by `denominator`, or by the class weights of the
            targets that are not ignored; for probabilities, by the number of rows; over no row it is NaN.
        ignore_index: rows with this target contribute nothing; -100 where None. Not for probabilities.
        label_smoothing: as in :func:`cross_entropy`.
        options: a :class:`torch.nn.LinearCrossEntropyOptions`, of which the chunk size is heeded: there is no
            need for the others here.
        sample_weight: v, of each row, in the shape of the losses. Rows of weight 0 are left out before the
            products. It does not enter the denominator of 'mean'.
        z_loss: z, the weight of the squared log-sum-exp.
        softcap: k > 0. Where it is a tensor that requires a gradient, the logits exist in full.
        logit_scale: s; it may be a 0-dim tensor that requires a gradient, and is then multiplied into h and b.
        denominator: what 'mean' divides by, a number or a 0-dim tensor: the count of all devices and all
            steps of an accumulation, say. A batch without a row that counts is then 0 and not NaN.
        memory_budget: bytes of scratch beside the gradients; None: 64 MiB, 16 of a shard of the classes, on a
            GPU half of what the weight's gradient takes in float32, at least 256 MiB and at most 1 GiB. The
            float32 sum of a half-typed weight's gradient comes on top.
        exact_logits: whether logits of half types keep their digits in every row. A CPU that multiplies
            bfloat16 itself rounds them to it, but for rows that have one beyond 8, and for results that come
            without gradients ('none', `no_grad`); a GPU rounds all of them, or takes its products in float32.
        class_group: a ProcessGroup, or a DeviceMesh of one dimension, among whose processes the classes are
            divided, in the order of ranks and not necessarily evenly: `linear_weight` and `linear_bias` are
            those of this process. All else is the same on each, labels are numbered over all classes,
            `weight` is of all of them, and probabilities of all or of this process's. So are the results, bit
            by bit, and the input's gradient, which is summed over the group: by one exchange of eight numbers
            a row and chunk, and two more a loss.

    Raises:
        ValueError: `softcap` not above 0; a `memory_budget` that does not hold one row.
        RuntimeError: `ignore_index` with probabilities.
        TypeError: `z_loss` or `label_smoothing` that requires a gradient; a `class_group` that is no group.
        ValueError: a `class_group` of which this process is no member, or whose processes were given
            arguments that differ in more than their classes.
    """
    name = "linear_cross_entropy"
    reduction = reduction_of(name, reduction, denominator)
    given = (softcap, logit_scale, memory_budget, exact_logits, class_group)
    head = Head(name, input, linear_weight, linear_bias, *given)
    ignore_index = index(name, ignore_index)
    probabilities = head.check_target(target, weight, ignore_index)
    return head.run(
        LinearCall,
        target,
        weight,
        head.check_sample_weight(sample_weight),
        scalar(name, denominator, input),
        probabilities=probabilities,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        smoothing=label_smoothing,
        z_loss=finite(name, "z_loss", z_loss),
        chunk_rows=head.chunk_rows(options),
    )


def of_any(kind: Any) -> Any:
    """Also of one iterable: so `Tensor.__torch_function__` makes the results of subclasses."""
    of_fields = kind.__new__

    def new(cls: Any, *fields: Any, **named: Any) -> Any:
        if len(fields) == 1 and not named:
            return cls._make(fields[0])
        return of_fields(cls, *fields, **named)

    kind.__new__ = new
    return kind


@of_any
class LogProb(NamedTuple):
    """Of each row; the first three are differentiable. `valid` is the number of rows that count."""

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor
    correct: Tensor
    valid: Tensor


@loss(
    None,
    HEADS,
    row(
        _of_indices,
        {
            "all": lambda t, g: biased(
                t, g, ignore_index=ignored(t[2]), temperature=0.7, softcap=3.0
            )
        },
        reductions=(),
        kind="heads",
        indices=2,
        whole=(1,),
        learned=("linear_bias",),
        composed=composed.linear_log_prob,
    ),
    statistics=boolean,
    exact_logits=boolean,
)
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    temperature: Tensor | float = 1.0,
    softcap: Tensor | float | None = None,
    statistics: bool = False,
    memory_budget: int | None = None,
    exact_logits: bool = False,
    class_group: Any = None,
) -> Tensor | LogProb:
    r"""The log-probability that a linear head gives each target, :math:`\log \mathrm{softmax}(x / T)_y`.

    The logits x are those of :func:`linear_cross_entropy`, capped before they are divided by the temperature
    T, and never exist as a whole; backward makes them once more.

    Args:
        input: (..., D).
        linear_weight: (C, D), or (C, d1, ..., D).
        target: class indices, (...) or (..., d1, ...).
        linear_bias: (C) or (C, d1, ...).
        ignore_index: rows with this target get 0 in everything; -100 where None.
        temperature: T > 0; it may be a 0-dim tensor that requires a gradient. Beside a `softcap` the logits
            exist in full then.
        softcap: as in :func:`linear_cross_entropy`.
        statistics: also give each row's log-sum-exp, entropy and whether no class is above the target's, and
            the number of rows that count: from the same pass, and without a stop of a GPU's queue.
        memory_budget: as in :func:`linear_cross_entropy`.
        exact_logits: as there; it is the gradients' that may be rounded.
        class_group: as there.

    Returns:
        The log-probabilities in the target's shape, of float32 at least; or a `LogProb` of them
        with the statistics, of which all but `correct` and `valid` are differentiable.

    Raises:
        ValueError: a `temperature` not above 0.
    """
    name = "linear_log_prob"
    temperature = setting(name, "temperature", temperature, above=0.0, folds=softcap is None)
    given = (softcap, 1 / temperature, memory_budget, exact_logits, class_group)
    head = Head(name, input, linear_weight, linear_bias, *given)
    if softcap is not None:
        head.softcap = head.softcap / temperature
    head.dtype = torch.promote_types(head.dtype, torch.float32)
    ignore_index = index(name, ignore_index)
    if head.check_target(target, None, ignore_index):
        errors.fail(
            RuntimeError, name, f"target holds probabilities of {target.dtype}, not indices"
        )
    ignored = -100 if ignore_index is None else ignore_index

    def finish(results: Sequence[Tensor]) -> Tensor | LogProb:
        losses, *rest = results
        if not statistics:
            return -losses
        lse, entropy, correct = rest
        valid = sharded.settled((target.to(torch.int64) != ignored).sum())
        return LogProb(-losses, lse, entropy, correct.bool(), valid)

    return head.run(
        LinearCall,
        target,
        probabilities=False,
        reduction="none",
        ignore_index=ignored,
        smoothing=0.0,
        z_loss=0.0,
        statistics=statistics,
        finish=finish,
    )
