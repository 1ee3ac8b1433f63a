"""Classification: cross entropy of logits, and the likelihood of log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..core import advice, errors, levels
from ..core.reduce import resolve, result_dtype
from ..front import strict
from ..front.definition import BenchCase, Bounds, Loss, normal, plain, register, uniform
from ..kinds.rows import RowsCall
from ..route.dispatch import dispatch
from ..route.memo import repeat

INDICES = frozenset(
    {
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    }
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
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
        size_average: deprecated, overrides `reduction`.
        ignore_index: rows with this target contribute nothing. Not for probabilities.
        reduce: deprecated, overrides `reduction`.
        reduction: 'none', 'sum' or 'mean'. 'mean' divides by the weights of the targets that are not
            ignored; for probabilities, by the number of rows.
        label_smoothing: h, in [0, 1].

    Returns:
        A scalar, or the losses of all rows with 'none', in the input's type (for probabilities, in
        the type that both promote to; float32 under autocast). 'mean' over no row is NaN.

    Raises:
        IndexError: a class index out of range; its position is named.
        ValueError: unknown `reduction`; batch sizes that differ.
        RuntimeError: other shapes that do not fit; a weight not of shape (C) or of another type;
            a target neither integer nor floating; `label_smoothing` out of range; `ignore_index` with
            probabilities; devices that differ.
        NotImplementedError: integer or complex input.
        TypeError: an argument that is no tensor; an `ignore_index` that is no integer, a `label_smoothing`
            that is no number.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    name = "cross_entropy"
    settings = (
        (reduction, ignore_index, type(ignore_index), label_smoothing)
        if weight is size_average is reduce is None
        else None
    )
    if settings and (known := repeat(name, (input, target, None), settings)) is not None:
        return known
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        errors.not_tensors(name, TypeError, input=input, target=target)
    if not (weight is None or isinstance(weight, Tensor)):
        errors.not_tensors(name, TypeError, input=input, target=target, weight=weight)
    if not (type(ignore_index) is int and abs(ignore_index) < 2**63):
        ignore_index = errors.integer(name, "ignore_index", ignore_index)
    reduction = resolve(name, reduction, size_average, reduce)
    if target.device != input.device or weight is not None:
        errors.same_device(name, input=input, target=target, weight=weight)
    if type(label_smoothing) is not float:
        label_smoothing = errors.number(name, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        errors.fail(
            RuntimeError,
            name,
            f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}",
        )
    dtype = result_dtype(input.dtype, input)
    probabilities = target.shape == input.shape
    if probabilities:
        if not target.is_floating_point() or not input.dim():
            errors.fail(
                RuntimeError,
                name,
                "Expected floating point type for target with class probabilities, got "
                f"{target.dtype}: a target of the input's shape {list(input.shape)} holds "
                "probabilities, class indices lack the class dimension" + _meant(input),
            )
        if ignore_index >= 0:
            errors.fail(
                RuntimeError,
                name,
                "ignore_index is not supported for floating point target, got ignore_index = "
                f"{ignore_index}",
            )
        _check_input(name, "log_softmax_lastdim_kernel_impl", input, target)
        if weight is not None:
            check_weight(name, input, weight)
            if weight.is_complex():
                errors.not_floating(name, RuntimeError, "mul", weight=weight)
        for other in (target, weight):
            if other is not None:
                dtype = torch.promote_types(dtype, other.dtype)
    else:
        _check_input(name, "log_softmax_lastdim_kernel_impl", input, target)
        weight = _flat(input, weight)
        check_indices(name, input, target, weight, dtype)
    call = RowsCall(name, probabilities, reduction, ignore_index, label_smoothing, dtype)
    return _run(name, call, input, target, weight, settings)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log likelihood: :math:`\ell = -w_y\,x_y`, for class y of log-probabilities x.

    As :func:`torch.nn.functional.nll_loss`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html), but class indices may be of
    any integer type.

    Args:
        input: log-probabilities, (C), (N, C) or (N, C, d1, ...).
        target: class indices, (), (N) or (N, d1, ...).
        weight: of each class, (C).
        size_average: deprecated, overrides `reduction`.
        ignore_index: rows with this target contribute nothing.
        reduce: deprecated, overrides `reduction`.
        reduction: 'none', 'sum' or 'mean'. 'mean' divides by the weights of the targets that are not
            ignored.

    Returns:
        A scalar, or the losses of all rows with 'none', in the input's type (float32 under autocast).
        'mean' over no row is NaN.

    Raises:
        IndexError: a class index out of range; its position is named.
        ValueError: unknown `reduction`; batch sizes that differ; a 0-dim input.
        RuntimeError: other shapes that do not fit; a weight not of shape (C) or of another type; a
            target that is not integer; devices that differ.
        NotImplementedError: integer or complex input.
        TypeError: an argument that is no tensor; an `ignore_index` that is no integer.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            nll_loss,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
        )
    name = "nll_loss"
    settings = (
        (reduction, ignore_index, type(ignore_index))
        if weight is size_average is reduce is None
        else None
    )
    if settings and (known := repeat(name, (input, target, None), settings)) is not None:
        return known
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        errors.not_tensors(name, TypeError, input=input, target=target)
    if not (weight is None or isinstance(weight, Tensor)):
        errors.not_tensors(name, TypeError, input=input, target=target, weight=weight)
    if not (type(ignore_index) is int and abs(ignore_index) < 2**63):
        ignore_index = errors.integer(name, "ignore_index", ignore_index)
    reduction = resolve(name, reduction, size_average, reduce)
    if target.device != input.device or weight is not None:
        errors.same_device(name, input=input, target=target, weight=weight)
    dtype = result_dtype(input.dtype, input)
    weight = _flat(input, weight)
    check_indices(name, input, target, weight, dtype)
    _check_input(name, "nll_loss_out_frame", input, target)
    call = RowsCall(name, False, reduction, ignore_index, 0.0, dtype)
    return _run(name, call, input, target, weight, settings)


def _flat(input: Tensor, weight: Tensor | None) -> Tensor | None:
    """Of images and the like PyTorch takes a class weight of any shape."""
    return weight.flatten() if weight is not None and input.dim() > 2 else weight


def _meant(input: Tensor) -> str:
    """Of an integer target in the input's shape."""
    if input.dim() == 1:
        return (
            ". One logit a row is for binary_cross_entropy_with_logits, with target.float(); of one row, "
            "pass input.unsqueeze(0)"
        )
    return ": of a one-hot one pass target.argmax(1), or target.float()" if input.dim() else ""


def _check_input(name: str, words: str, input: Tensor, target: Tensor) -> None:
    if not input.is_floating_point():
        hint = advice.swapped(input, target)
        errors.not_floating(name, NotImplementedError, words, hint, input=input)
    errors.not_narrow(name, words, input=input, target=target)


def check_indices(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype
) -> None:
    """Shapes and types of a call with class indices; the range is the kernel's to check.

    `dtype` is that of the result, which the weight must have: under autocast every half type counts as it.
    """
    shape, wanted = input.shape, target.shape
    if not shape:
        errors.fail(
            ValueError, name, "Expected 1 or more dimensions (got 0): input is (C), (N, C) or more"
        )
    if len(shape) == 1:
        if wanted not in ((), (1,)):
            errors.fail(
                ValueError if len(wanted) == 1 else RuntimeError,
                name,
                "For 1D input, 1D target must have size 1, but got target size: "
                f"{wanted[0] if len(wanted) == 1 else list(wanted)}{advice.swapped(input, target)}",
            )
    elif wanted != (shape[:1] if len(shape) == 2 else shape[:1] + shape[2:]):
        _bad_shape(name, shape, target)
    if target.dtype not in INDICES:
        errors.fail(
            RuntimeError,
            name,
            f"expected target dtype to be Long or Byte (any integer type serves), but got "
            f"{target.dtype}: class indices are integers (target.long())"
            + (
                f", class probabilities have the input's shape {list(shape)}"
                if name == "cross_entropy"
                else ""
            ),
        )
    if weight is None:
        return
    check_weight(name, input, weight)
    if input.is_floating_point() and result_dtype(weight.dtype, weight) is not dtype:
        errors.fail(
            RuntimeError,
            name,
            f"expected scalar type {errors.scalar_type(dtype)} but found "
            f"{errors.scalar_type(weight.dtype)} for weight: pass weight.to(input.dtype)",
        )


def _bad_shape(name: str, shape: torch.Size, target: Tensor) -> None:
    fits, wanted = list(shape[:1] + shape[2:]), target.shape
    of_head = name.startswith("linear_")
    hint = advice.class_target(shape, target, name == "cross_entropy", of_head)
    if not wanted or wanted[0] != shape[0]:
        errors.fail(
            ValueError if wanted or shape[0] else IndexError if len(shape) == 2 else RuntimeError,
            name,
            f"Expected input batch_size ({shape[0]}) to match target batch_size "
            f"({wanted[0] if wanted else 'none'}): input {list(shape)}, target {list(wanted)}{hint}",
        )
    if len(shape) == 2 and len(wanted) > 1:
        errors.fail(
            RuntimeError,
            name,
            f"0D or 1D target tensor expected, multi-target not supported: input {list(shape)} needs "
            f"a target {fits}, got {list(wanted)}{hint}",
        )
    errors.fail(
        RuntimeError,
        name,
        f"size mismatch (got input: {list(shape)}, target: {list(wanted)}). Expected target size "
        f"{fits}, got {list(wanted)}{hint}",
    )


def check_weight(name: str, input: Tensor, weight: Tensor) -> None:
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    if weight.shape != (classes,):
        errors.fail(
            RuntimeError,
            name,
            f"weight tensor should be defined either for all {classes} classes or no classes but "
            f"got weight tensor of shape: {list(weight.shape)}",
        )


def _run(
    name: str,
    call: RowsCall,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    settings: tuple[object, ...] | None,
) -> Tensor:
    if levels.strict():
        strict.check(name, input, target, reduction=call.reduction, ignore_index=call.ignore_index)
    why = None
    if call.probabilities and input.numel() == 0 and input.shape[min(input.dim() - 1, 1)] == 0:
        why = "there are no classes"
    return dispatch(name, call, (input, target, weight), why, settings)


def _index_example(shape, dtype, generator):
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = torch.randint(classes, shape[:1][: len(shape) - 1] + shape[2:], generator=generator)
    return 3 * normal(shape, dtype, generator), target


def _log_p_example(shape, dtype, generator):
    logits, target = _index_example(shape, torch.float64, generator)
    return logits.log_softmax(0 if len(shape) == 1 else 1).to(dtype), target


def _weight(tensors, generator):
    classes = tensors[0].shape[0] if tensors[0].dim() == 1 else tensors[0].shape[1]
    return uniform((classes,), tensors[0].dtype, generator, 0.1, 2)


def _soft_example(shape, dtype, generator):
    x = normal(shape, torch.float64, generator)
    q = normal(shape, torch.float64, generator).softmax(0 if len(shape) == 1 else 1)
    return (3 * x).to(dtype), q.to(dtype)


def _ignored(tensors, generator):
    """An ignore_index that hits some rows."""
    return int(tensors[1].flatten()[0]) if tensors[1].numel() else 0


register(
    Loss(
        cross_entropy,
        "CrossEntropyLoss",
        _index_example,
        {
            "plain": plain,
            "weight": lambda t, g: {"weight": _weight(t, g)},
            "ignore_index": lambda t, g: {"ignore_index": _ignored(t, g)},
            "label_smoothing": lambda t, g: {"label_smoothing": 0.1},
            "all": lambda t, g: {
                "weight": _weight(t, g),
                "ignore_index": _ignored(t, g),
                "label_smoothing": 0.2,
            },
        },
        differentiable=(0,),
        indices=1,
        kind="rows",
        # The formula's gradient is torch's, of log_softmax in the type computed in.
        bounds=Bounds(float32=(2, 3), float64=(8, 8), formula=(4, 64)),
        bench=(
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
            BenchCase(
                "CE 8192x128256 bf16", (8192, 128256), "bfloat16", group="gpu", compiled=True
            ),
            BenchCase(
                "CE 32768x32768 bf16", (32768, 32768), "bfloat16", group="gpu", compiled=True
            ),
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
        ),
    )
)
register(
    Loss(
        nll_loss,
        "NLLLoss",
        _log_p_example,
        {
            "plain": plain,
            "weight": lambda t, g: {"weight": _weight(t, g)},
            "ignore_index": lambda t, g: {"ignore_index": _ignored(t, g)},
            "both": lambda t, g: {"weight": _weight(t, g), "ignore_index": _ignored(t, g)},
        },
        differentiable=(0,),
        indices=1,
        kind="rows",
        bench=(
            BenchCase("NLL 4096x1024", (4096, 1024), at_most={"eager": 1.0}),
            BenchCase("NLL 65536x1024", (65536, 1024), group="gpu"),
        ),
    )
)
register(
    Loss(
        cross_entropy,
        "CrossEntropyLoss",
        _soft_example,
        {
            "plain": plain,
            "weight": lambda t, g: {"weight": _weight(t, g)},
            "label_smoothing": lambda t, g: {"label_smoothing": 0.1},
            "both": lambda t, g: {"weight": _weight(t, g), "label_smoothing": 0.2},
        },
        kind="rows",
        variant="probabilities",
        bounds=Bounds(float32=(2, 3), float64=(8, 128), formula=(8, 64), triton=(4, 16)),
        bench=(
            BenchCase(
                *("CE probabilities 1024x32000", (1024, 32000), "float32", "plain", "options"),
                beside="cross_entropy",
                at_most={"plain": 1.6},
            ),
            BenchCase("CE probabilities 8192x32000 bf16", (8192, 32000), "bfloat16", group="gpu"),
        ),
    )
)
