"""Losses of a linear head, whose logits never exist as a whole."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..core import errors, plain, sharded
from ..core.plain import PLAIN
from ..core.reduce import autocasts, resolve, result_dtype
from ..front.classes import check_indices, check_weight
from ..front.definition import Bounds, Loss, normal, register, uniform
from ..front.definition import plain as no_options
from ..front.loss import FUNCTIONS
from ..kinds.distill import KINDS, DistillCall
from ..kinds.heads import LinearCall, Slots
from ..route.heads import dispatch
from . import composed

SOFTMAX = "log_softmax_lastdim_kernel_impl"  # PyTorch's name for what a type is lacking

# What the matrix products take, and a teacher's logits: DTensors, all or none; all else counts as replicated.
MULTIPLIED = (
    "input",
    "linear_weight",
    "linear_bias",
    "teacher_input",
    "teacher_weight",
    "teacher_bias",
    "teacher_logits",
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
            targets that are not ignored; for probabilities, by the number of rows.
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
        memory_budget: bytes of scratch beside the gradients; None: 64 MiB, on a GPU half of what the weight's
            gradient takes in float32, at least 256 MiB and at most 1 GiB. The float32 sum of a half-typed
            weight's gradient comes on top.

    Returns:
        A scalar, or the losses of all rows with 'none', in the input's type (float32 under autocast).
        'mean' over no row is NaN.

    Raises:
        IndexError: a class index out of range; its position is named.
        ValueError: unknown `reduction`; batch sizes that differ; `softcap` not above 0; a `memory_budget` that
            does not hold one row.
        RuntimeError: other shapes that do not fit; dtypes or devices that differ; `label_smoothing` out of
            range; `ignore_index` with probabilities; a tensor whose storage was freed; DTensors beside others.
        NotImplementedError: integer or complex input.
        TypeError: an argument that is no tensor; `z_loss` or `label_smoothing` that requires a gradient.
    """
    name = "linear_cross_entropy"
    tensors = (input, linear_weight, target, linear_bias, weight, sample_weight, denominator)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            sample_weight=sample_weight,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            denominator=denominator,
            memory_budget=memory_budget,
        )
    _check_tensors(
        name,
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
        sample_weight=sample_weight,
        denominator=denominator,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    reduction = _reduction(name, reduction, denominator)
    head = Head(name, input, linear_weight, linear_bias, softcap, logit_scale, memory_budget)
    ignore_index = _index(name, ignore_index)
    label_smoothing = errors.number(name, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        errors.fail(
            RuntimeError,
            name,
            f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}",
        )
    probabilities = head.check_target(target, weight, ignore_index)
    (result,) = head.run(
        LinearCall,
        target,
        weight,
        head.check_sample_weight(sample_weight),
        _scalar(name, "denominator", denominator, input),
        probabilities=probabilities,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        smoothing=label_smoothing,
        z_loss=_finite(name, "z_loss", z_loss),
        chunk_rows=head.chunk_rows(options),
    )
    return result


class LogProb(NamedTuple):
    """Of each row; the first three are differentiable. `valid` is the number of rows that count."""

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor
    correct: Tensor
    valid: Tensor


_of_fields = LogProb.__new__


def _of_any(cls: type[LogProb], *fields: Any, **named: Any) -> LogProb:
    """Also of one iterable: so `Tensor.__torch_function__` makes the results of subclasses."""
    if len(fields) == 1 and not named:
        return cls._make(fields[0])
    return _of_fields(cls, *fields, **named)


LogProb.__new__ = _of_any  # type: ignore[assignment,method-assign]


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

    Returns:
        The log-probabilities in the target's shape, of float32 at least; or a `LogProb` of them
        with the statistics, of which all but `correct` and `valid` are differentiable.

    Raises:
        As :func:`linear_cross_entropy`; ValueError for a `temperature` not above 0.
    """
    name = "linear_log_prob"
    tensors = (input, linear_weight, target, linear_bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_log_prob,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            statistics=statistics,
            memory_budget=memory_budget,
        )
    _check_tensors(
        name,
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        temperature=temperature,
        softcap=softcap,
    )
    temperature = _setting(name, "temperature", temperature, above=0.0, folds=softcap is None)
    head = Head(name, input, linear_weight, linear_bias, softcap, 1 / temperature, memory_budget)
    if softcap is not None:
        head.softcap = head.softcap / temperature
    head.dtype = torch.promote_types(head.dtype, torch.float32)
    ignore_index = _index(name, ignore_index)
    statistics = errors.boolean(name, "statistics", statistics)
    if head.check_target(target, None, ignore_index):
        errors.fail(
            RuntimeError, name, f"target holds probabilities of {target.dtype}, not indices"
        )
    ignored = -100 if ignore_index is None else ignore_index
    loss, *rest = head.run(
        LinearCall,
        target,
        probabilities=False,
        reduction="none",
        ignore_index=ignored,
        smoothing=0.0,
        z_loss=0.0,
        statistics=statistics,
    )
    if not statistics:
        return -loss
    lse, entropy, correct = rest
    return LogProb(-loss, lse, entropy, correct.bool(), (target.to(torch.int64) != ignored).sum())


def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    target: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    softcap: Tensor | float | None = None,
    teacher_softcap: float | None = None,
    denominator: Tensor | float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    r"""Distillation: the divergence of a student's head from a teacher's, the logits of neither in full.

    With s and t the softmax of the student's and of the teacher's logits over the temperature, and
    :math:`m = \beta t + (1 - \beta) s`, the loss of a row is

    .. math::
        \ell = w_\text{soft}\, D(t, s) + w_\text{hard}\, \mathrm{cross\_entropy}(x, y),\qquad D = \begin{cases}
        \mathrm{KL}(t \| s) & \text{forward} \\ \mathrm{KL}(s \| t) & \text{reverse} \\
        \beta\, \mathrm{KL}(t \| m) + (1 - \beta)\, \mathrm{KL}(s \| m) & \text{js} \end{cases}

    ('js' is the generalised Jensen-Shannon divergence of https://arxiv.org/abs/2306.13649.) The hard term
    takes the logits x without the temperature. Where both terms are used, Hinton et al.
    (https://arxiv.org/abs/1503.02531) scale the soft one by the temperature's square: `soft_weight`.
    The teacher is a constant here: no gradient flows to it.

    Args:
        input: the student's, (..., D).
        linear_weight: the student's, (C, D).
        teacher_input: (..., E).
        teacher_weight: (C, E).
        linear_bias: (C).
        teacher_bias: (C).
        teacher_logits: (..., C), in place of the teacher's head.
        temperature: greater than 0. Where it is a tensor that requires a gradient, the logits exist in full.
        divergence: 'forward', 'reverse' or 'js'.
        beta: of 'js', between 0 and 1.
        target: class indices (...): of the hard term, and rows that are ignored do not count in either.
        soft_weight: of the divergence.
        hard_weight: of the cross entropy; it needs `target`.
        ignore_index: rows with this target contribute nothing.
        reduction: 'none', 'sum' or 'mean', which divides by `denominator` or by the number of rows that count.
        sample_weight: of each row, (...). It does not enter the denominator.
        softcap: of the student's logits, as in :func:`linear_cross_entropy`.
        teacher_softcap: of the teacher's.
        denominator: as in :func:`linear_cross_entropy`.
        memory_budget: as in :func:`linear_cross_entropy`.

    Returns:
        A scalar, or the losses of all rows with 'none', in the input's type (float32 under autocast).

    Raises:
        As :func:`linear_cross_entropy`; ValueError for an unknown `divergence`, a `temperature` or `beta`
        out of range, a teacher given twice or not at all, and `hard_weight` without `target`; TypeError for
        `beta`, `soft_weight`, `hard_weight` or `teacher_softcap` that requires a gradient.
    """
    name = "linear_kl_div"
    teacher = (teacher_input, teacher_weight, teacher_bias, teacher_logits)
    tensors = (input, linear_weight, linear_bias, target, sample_weight, denominator, *teacher)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_kl_div,
            tensors,
            input,
            linear_weight,
            teacher_input,
            teacher_weight,
            linear_bias=linear_bias,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            target=target,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            sample_weight=sample_weight,
            softcap=softcap,
            teacher_softcap=teacher_softcap,
            denominator=denominator,
            memory_budget=memory_budget,
        )
    _check_tensors(
        name,
        input=input,
        linear_weight=linear_weight,
        linear_bias=linear_bias,
        target=target,
        sample_weight=sample_weight,
        denominator=denominator,
        teacher_input=teacher_input,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        teacher_logits=teacher_logits,
        temperature=temperature,
        softcap=softcap,
    )
    if divergence not in KINDS:
        expected = ", ".join(map(repr, KINDS))
        errors.fail(ValueError, name, f"divergence must be one of {expected}, got {divergence!r}")
    beta, hard_weight = errors.number(name, "beta", beta), _finite(name, "hard_weight", hard_weight)
    ignore_index = errors.integer(name, "ignore_index", ignore_index)
    if not 0 < beta < 1:
        errors.fail(ValueError, name, f"beta must be between 0 and 1, got {beta}")
    if hard_weight and target is None:
        errors.fail(ValueError, name, f"hard_weight = {hard_weight} needs a target")
    reduction = _reduction(name, reduction, denominator)
    head = Head(name, input, linear_weight, linear_bias, softcap, 1.0, memory_budget)
    if head.out:
        errors.fail(
            RuntimeError,
            name,
            f"expected linear_weight with dimensionality 2, got {list(linear_weight.shape)}",
        )
    if target is not None and head.check_target(target, None, ignore_index):
        errors.fail(
            RuntimeError, name, f"target holds probabilities of {target.dtype}, not indices"
        )
    (result,) = head.run(
        DistillCall,
        target,
        None,
        head.check_sample_weight(sample_weight),
        _scalar(name, "denominator", denominator, input),
        head.teacher(*teacher),
        probabilities=False,
        reduction=reduction,
        ignore_index=ignore_index,
        smoothing=0.0,
        z_loss=0.0,
        divergence=divergence,
        beta=beta,
        temperature=_setting(name, "temperature", temperature, above=0.0),
        teacher_softcap=0.0
        if teacher_softcap is None
        else _finite(name, "teacher_softcap", teacher_softcap, above=0.0),
        soft_weight=_finite(name, "soft_weight", soft_weight),
        hard_weight=hard_weight,
    )
    return result


def _reduction(name: str, reduction: str, denominator: Tensor | float | None) -> str:
    reduction = resolve(name, reduction)
    if denominator is not None and reduction != "mean":
        errors.fail(ValueError, name, f"denominator is for reduction = 'mean', got {reduction!r}")
    return reduction


class Head:
    """A checked head: its tensors in the shapes of `linear/call.py`, and the settings of its logits."""

    def __init__(
        self,
        name: str,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        softcap: Tensor | float | None,
        logit_scale: Tensor | float,
        memory_budget: int | None,
        prefix: str = "",  # of a teacher's arguments
    ) -> None:
        self.name, self.prefix = name, prefix
        names = [f"{prefix}input", f"{prefix or 'linear_'}weight", f"{prefix or 'linear_'}bias"]
        tensors = zip(names, (input, linear_weight, linear_bias), strict=True)
        given = {key: tensor for key, tensor in tensors if tensor is not None}
        errors.tensors(name, TypeError, **given)
        errors.same_device(name, **given)
        self._check_shapes(names, input, linear_weight, linear_bias)
        if not input.is_floating_point():
            errors.not_floating(name, NotImplementedError, "addmm_impl_cpu_", **{names[0]: input})
        errors.not_narrow(name, SOFTMAX, **given)
        scale = _setting(name, "logit_scale", logit_scale, folds=True)
        if isinstance(scale, Tensor):
            # It learns, as a factor of what is multiplied: s (h W^T + b) = (s h) W^T + s b.
            size = _size(scale) if _multiplied_in(input) is torch.float16 else 1.0
            rest = scale / size
            given = {key: t if key == names[1] else _times(t, rest) for key, t in given.items()}
            scale = size
        self.logit_scale = scale
        self.dtype = result_dtype(input.dtype, input)
        if autocasts(input.device.type):
            given = {key: _as_autocast(t) for key, t in given.items()}
            self.dtype = torch.promote_types(self.dtype, torch.float32)
        for key, tensor in given.items():
            if tensor.dtype != given[names[0]].dtype:
                errors.fail(
                    RuntimeError,
                    name,
                    f"{key} is of {tensor.dtype}, {names[0]} of {input.dtype}: expected mat1 and mat2 to have "
                    "the same dtype. Convert one, or run under torch.autocast",
                )
        self.input, self.linear_weight = given[names[0]], given[names[1]]
        self.linear_bias = given.get(names[2])
        self.batch, self.out = input.shape[:-1], linear_weight.shape[1:-1]
        self.classes, self.features = linear_weight.shape[0], input.shape[-1]
        self.softcap = 0.0 if softcap is None else _setting(name, "softcap", softcap, above=0.0)
        if memory_budget is not None:
            memory_budget = errors.integer(name, "memory_budget", memory_budget)
            if memory_budget <= 0:
                errors.fail(ValueError, name, f"memory_budget must be above 0, got {memory_budget}")
        self.memory_budget = memory_budget or 0

    def _check_shapes(
        self, names: list[str], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        name, (of_input, of_weight, of_bias) = self.name, names
        both = f"{of_input} {list(input.shape)} and {of_weight} {list(weight.shape)}"
        if not input.dim():
            errors.fail(
                RuntimeError,
                name,
                f"expected {of_input} with dimensionality 1 or 2 or more, got {input.dim()}",
            )
        if weight.dim() < 2:
            errors.fail(
                RuntimeError,
                name,
                f"expected {of_weight} with dimensionality at least 2, got {weight.dim()}",
            )
        if input.shape[-1] != weight.shape[-1]:
            errors.fail(
                RuntimeError,
                name,
                f"expected equal {of_input} and {of_weight} last dimensions (in_features), got "
                f"{input.shape[-1]} and {weight.shape[-1]}, respectively: {both}",
            )
        if bias is not None and bias.shape != weight.shape[:-1]:
            errors.fail(
                RuntimeError,
                name,
                f"expected {of_bias} shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}",
            )
        if weight.dim() > 2 and input.dim() < 2:
            errors.fail(
                RuntimeError,
                name,
                f"K-dimensional loss defined by {of_weight} shape {tuple(weight.shape)} requires "
                f"batched input, (N, {input.shape[-1]}), got unbatched input with shape "
                f"{tuple(input.shape)}",
            )

    def check_target(self, target: Tensor, weight: Tensor | None, ignore_index: int | None) -> bool:
        """Whether the target holds probabilities."""
        name = self.name
        errors.tensors(name, TypeError, target=target)
        if weight is not None:
            errors.tensors(name, TypeError, weight=weight)
        errors.same_device(name, input=self.input, target=target, weight=weight)
        shape = (*self.batch, self.classes, *self.out)
        if target.shape != shape:
            self._check_index_target(target, weight)
            return False
        if ignore_index is not None:
            errors.fail(
                RuntimeError,
                name,
                "ignore_index cannot be specified when target contains probabilities, got "
                f"{ignore_index}",
            )
        if not target.is_floating_point():
            errors.fail(
                RuntimeError,
                name,
                "Expected floating point type for target with class probabilities, got "
                f"{target.dtype}: a target of the logits' shape {list(shape)} holds probabilities",
            )
        errors.not_narrow(name, SOFTMAX, input=self.input, target=target)
        if weight is not None:
            errors.not_narrow(name, SOFTMAX, input=self.input, weight=weight)
            check_weight(name, self._logits(), weight)
        for other in (target, weight):
            if other is not None:
                self.dtype = torch.promote_types(self.dtype, other.dtype)
        return True

    def _logits(self) -> Tensor:
        """Of the shape that cross entropy would see, without memory."""
        batch = (math.prod(self.batch),) if self.batch else ()
        shape = (*batch, self.classes, *self.out)
        return torch.empty(shape, dtype=self.input.dtype, device="meta")

    def _check_index_target(self, target: Tensor, weight: Tensor | None) -> None:
        fits, wanted = (*self.batch, *self.out), target.shape
        if len(self.batch) > 1:
            if wanted != fits:
                errors.fail(
                    RuntimeError,
                    self.name,
                    f"expected input with dimensionality 1 or 2, got {len(self.batch) + 1}, or a target "
                    f"of shape {list(fits)} ({[*self.batch, self.classes, *self.out]} for "
                    f"probabilities), got {list(wanted)}",
                )
            target = target.flatten(0, len(self.batch) - 1)
        check_indices(self.name, self._logits(), target, weight, self.dtype)

    def check_sample_weight(self, sample_weight: Tensor | None) -> Tensor | None:
        name, fits = self.name, (*self.batch, *self.out)
        if sample_weight is None:
            return None
        errors.tensors(name, TypeError, sample_weight=sample_weight)
        errors.same_device(name, input=self.input, sample_weight=sample_weight)
        if sample_weight.shape != fits:
            errors.fail(
                RuntimeError,
                name,
                f"sample_weight must have the shape of the losses, {list(fits)}, got "
                f"{list(sample_weight.shape)}",
            )
        errors.not_narrow(name, "mul", sample_weight=sample_weight)
        if sample_weight.is_complex():
            errors.not_floating(name, RuntimeError, "mul", sample_weight=sample_weight)
        return sample_weight

    def chunk_rows(self, options: Any) -> int:
        """The rows that torch's options ask for; 0 where they leave it open."""
        if options is None:
            return 0
        if not hasattr(options, "batch_chunk_size"):
            words = "argument 'options' must be torch.nn.LinearCrossEntropyOptions"
            errors.fail(AttributeError, self.name, f"{words}, not {type(options).__name__}")
        if options.batch_chunk_size is None and options.chunking_method in (None, "auto"):
            return 0
        sizes = {
            "num_batches": math.prod(self.batch),
            "in_features": self.features,
            "num_classes": self.classes,
        }
        return options._adjust(
            **sizes, dtype=self.input.dtype, device=self.input.device
        ).batch_chunk_size

    def teacher(
        self,
        input: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        logits: Tensor | None,
    ) -> Slots:
        """The checked tensors of a teacher, as in `linear/distill.py`."""
        name = self.name
        if (logits is None) == (input is None or weight is None) or (
            logits is not None and not (input is weight is bias is None)
        ):
            errors.fail(
                ValueError,
                name,
                "the teacher is either teacher_input and teacher_weight (and teacher_bias) or "
                "teacher_logits",
            )
        if logits is None:
            assert input is not None and weight is not None
            head = Head(name, input, weight, bias, None, 1.0, None, prefix="teacher_")
            batch, classes = head.batch, (head.classes, *head.out)
            found: Slots = (head.input, head.linear_weight, head.linear_bias)
        else:
            errors.tensors(name, TypeError, teacher_logits=logits)
            if not logits.is_floating_point():
                errors.not_floating(name, NotImplementedError, "softmax", teacher_logits=logits)
            errors.not_narrow(name, SOFTMAX, teacher_logits=logits)
            batch, classes = logits.shape[:-1], logits.shape[-1:]
            found = (None, None, None)
        errors.same_device(name, input=self.input, teacher=logits if logits is not None else input)
        if batch != self.batch or classes != (self.classes,):
            errors.fail(
                RuntimeError,
                name,
                f"the teacher's logits are of shape {[*batch, *classes]}, the student's of "
                f"{[*self.batch, self.classes]}",
            )
        n = math.prod(batch)
        teacher_input, teacher_weight, teacher_bias = (
            t if t is None else t.detach() for t in found
        )
        return (
            None if teacher_input is None else teacher_input.reshape(n, teacher_input.shape[-1]),
            None if teacher_weight is None else teacher_weight.unsqueeze(1),
            None if teacher_bias is None else teacher_bias.unsqueeze(1),
            None if logits is None else logits.detach().reshape(n, self.classes),
        )

    def run(
        self,
        kind: type[LinearCall],
        target: Tensor | None,
        weight: Tensor | None = None,
        sample_weight: Tensor | None = None,
        denominator: Tensor | None = None,
        teacher: Slots = (),
        **settings: Any,
    ) -> tuple[Tensor, ...]:
        """Runs the call; results of rows are shaped as the caller's rows."""
        call = kind(
            **{
                "loss": self.name,
                "statistics": False,
                "chunk_rows": 0,
                "softcap": self.softcap,
                "logit_scale": self.logit_scale,
                "memory_budget": self.memory_budget,
                "dtype": self.dtype,
                **settings,
            }
        )
        n, k = math.prod(self.batch), math.prod(self.out)
        of_target = (n, self.classes, k) if call.probabilities else (n, k)
        tensors: Slots = (
            self.input.reshape(n, self.features),
            self.linear_weight.reshape(self.classes, k, self.features),
            None if self.linear_bias is None else self.linear_bias.reshape(self.classes, k),
            None if target is None else target.reshape(of_target),
            weight,
            None if sample_weight is None else sample_weight.reshape(n, k),
            denominator,
            *teacher,
        )
        if not torch.compiler.is_compiling():
            # Zeros without memory, which autograd makes, get some.
            tensors = tuple(
                t.clone() if t is not None and t._is_zerotensor() else t for t in tensors
            )
        results = dispatch(call, tensors, target)
        if call.reduction != "none":
            return results
        return tuple(t.reshape((*self.batch, *self.out)) for t in results)


def _index(name: str, ignore_index: int | None) -> int | None:
    return None if ignore_index is None else errors.integer(name, "ignore_index", ignore_index)


def _check_tensors(name: str, **arguments: Any) -> None:
    """Refuses tensors without memory, sparse ones, and distributed ones beside plain ones."""
    if torch.compiler.is_compiling():
        return
    given = {key: t for key, t in arguments.items() if isinstance(t, Tensor)}
    plain.check(name, **given)
    odd = [k for k, t in given.items() if type(t) not in PLAIN or t.layout is not torch.strided]
    if odd:
        _check_odd(name, odd, given)


def _check_odd(name: str, odd: list[str], given: dict[str, Tensor]) -> None:
    for key in odd:
        if type(given[key]) in PLAIN:
            words = f"{key} has layout {given[key].layout}, which no linear loss takes: to_dense()"
            errors.fail(RuntimeError, name, words)
    spread = [key for key in odd if sharded.is_sharded(given[key])]
    local = [key for key in given if key in MULTIPLIED and key not in spread]
    if spread and local:
        errors.fail(
            RuntimeError,
            name,
            f"{spread[0]} is a DTensor, {local[0]} is not: got mixed torch.Tensor and DTensor. The weight of a "
            "head that fully_shard divided is whole after head.unshard(), or inside of its forward: "
            "full_tensor() alone gives a gradient that is not reduced over the processes. Other tensors "
            "become DTensors by distribute_tensor()",
        )


def _multiplied_in(tensor: Tensor) -> torch.dtype:
    """The type of the products: of autocast, or of what is given."""
    device = tensor.device.type
    wide = tensor.dtype is torch.float64 or not autocasts(device)
    return tensor.dtype if wide else torch.get_autocast_dtype(device)


def _size(scale: Tensor) -> float:
    """The power of two above a scale beyond 1, by which float16 may overflow; 1 where no look is free."""
    if torch.compiler.is_compiling() or not (scale.is_cpu and plain.is_plain(scale.detach())):
        return 1.0
    return math.ldexp(1.0, min(max(math.frexp(scale.item())[1], 0), 1023))


def _as_autocast(tensor: Tensor) -> Tensor:
    """In the type that autocast multiplies in; it leaves float64 alone, and integers."""
    if tensor.dtype is torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _finite(name: str, argument: str, value: float, above: float = -math.inf) -> float:
    value = errors.number(name, argument, value)
    # torch.compile traces no math.isfinite of a number that varies.
    if not above < value < math.inf:
        rule = "finite" if above == -math.inf else f"finite and greater than {above:g}"
        errors.fail(ValueError, name, f"{argument} must be {rule}, got {value}")
    return value


def _times(tensor: Tensor, scale: Tensor) -> Tensor:
    """The product. Infinities (masked classes, ignored rows) have no part in its derivative by the scale."""
    finite = tensor.isfinite()
    rest = torch.where(finite, 0, tensor * scale.detach())
    return torch.where(finite, tensor, 0) * scale + rest


def _setting(
    name: str, argument: str, value: Any, above: float = -math.inf, folds: bool = False
) -> Any:
    """A finite number, or the 0-dim tensor of one that learns; or, where it `folds`, of one that is traced.

    On the meta device there is no number to read.
    """
    traced = isinstance(value, Tensor) and (
        value.is_meta or (folds and torch.compiler.is_compiling())
    )
    if not (traced or errors.learns(value)):
        return _finite(name, argument, value, above)
    if value.dim() or value.is_complex():
        got = f"{value.dtype} of shape {list(value.shape)}"
        words = f"argument '{argument}' must be float or a real 0-dim tensor, not {got}"
        errors.fail(TypeError, name, words)
    # Where it can be looked at, and no queue stops for it.
    if not torch.compiler.is_compiling() and value.is_cpu and plain.is_plain(value.detach()):
        _finite(name, argument, value.item(), above)
    return value


def _scalar(name: str, argument: str, value: Tensor | float | None, input: Tensor) -> Tensor | None:
    """A number as a 0-dim tensor."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return torch.full((), errors.number(name, argument, value), dtype=torch.float64)
    if value.dim():
        errors.fail(
            ValueError,
            name,
            f"{argument} must be a number or a 0-dim tensor, got {list(value.shape)}",
        )
    if value.is_complex():
        errors.fail(TypeError, name, f"{argument} must be real, got {value.dtype}")
    if not value.is_cpu:
        errors.same_device(name, input=input, **{argument: value})
    return value


CLASSES = 6  # of the examples


def _of_indices(shape, dtype, generator):
    target = torch.randint(CLASSES, shape[:-1], generator=generator)
    return *_of_states(shape, dtype, generator), target


def _of_probabilities(shape, dtype, generator):
    target = normal((*shape[:-1], CLASSES), torch.float64, generator).softmax(-1)
    return *_of_states(shape, dtype, generator), target.to(dtype)


def _of_states(shape, dtype, generator):
    size = max(shape[-1], 1) ** 0.5
    weight = 2 * normal((CLASSES, shape[-1]), torch.float64, generator) / size
    return normal(shape, dtype, generator), weight.to(dtype)


def _beside_a_teacher(shape, dtype, generator):
    teacher = (*shape[:-1], 5)
    return (*_of_states(shape, dtype, generator), *_of_states(teacher, dtype, generator))


def _biased(t, g, **settings):
    return {"linear_bias": normal((CLASSES,), t[0].dtype, g), **settings}


def _of_rows(t, g):
    return uniform(tuple(t[0].shape[:-1]), t[0].dtype, g, 0.5, 1.5)


def _hard(t, g):
    target = torch.randint(CLASSES, tuple(t[0].shape[:-1]), generator=g)
    weights = {"hard_weight": 0.4, "soft_weight": 0.7}
    return {"target": target, "ignore_index": _ignored(target), **weights}


def _ignored(target):
    """An ignore_index that hits some rows, but not all."""
    found = target.unique()
    return int(found[0]) if len(found) > 1 else -100


register(
    Loss(
        linear_cross_entropy,
        "",
        _of_indices,
        {
            "plain": no_options,
            "all": lambda t, g: _biased(
                *(t, g),
                weight=uniform((CLASSES,), t[0].dtype, g, 0.1, 2),
                ignore_index=_ignored(t[2]),
                label_smoothing=0.2,
                sample_weight=_of_rows(t, g),
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
    )
)
register(
    Loss(
        linear_cross_entropy,
        "",
        _of_probabilities,
        {"all": lambda t, g: _biased(t, g, label_smoothing=0.2, z_loss=0.01)},
        differentiable=(0, 1, 2),
        kind="heads",
        variant="probabilities",
        # The gradient by the target of a certain class is log(1 + others) of what rounds to 1.
        bounds=Bounds(float32=(2, 3e5), float64=(2, 2e14), formula=(2, 8)),
        triton=False,
        whole=(1,),
        learned=("linear_bias",),
        composed=composed.linear_cross_entropy,
    )
)
register(
    Loss(
        linear_log_prob,
        "",
        _of_indices,
        {
            "all": lambda t, g: _biased(
                t, g, ignore_index=_ignored(t[2]), temperature=0.7, softcap=3.0
            )
        },
        reductions=(),
        kind="heads",
        indices=2,
        whole=(1,),
        learned=("linear_bias",),
        composed=composed.linear_log_prob,
    )
)
register(
    Loss(
        linear_kl_div,
        "",
        _beside_a_teacher,
        {
            "forward": no_options,
            "reverse": lambda t, g: _biased(
                t, g, divergence="reverse", softcap=3.0, temperature=2.0
            ),
            "js": lambda t, g: _biased(
                *(t, g), divergence="js", beta=0.3, sample_weight=_of_rows(t, g), **_hard(t, g)
            ),
        },
        kind="heads",
        whole=(1, 3),
        learned=("linear_bias",),
        composed=composed.linear_kl_div,
        # The formula's slopes of 'js' lose digits where both are certain, of different classes.
        bounds=Bounds(float32=(2, 4), float64=(2, 4), formula=(4, 1e13)),
        triton=False,
    )
)
FUNCTIONS |= {f.__name__: f for f in (linear_cross_entropy, linear_kl_div, linear_log_prob)}
