"""What needs no logits: losses, log-probabilities, sums over the classes, and the best classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .. import losses
from ..core.reduce import autocasts, result_dtype
from ..engines.chunks.plan import BUDGET
from ..front.head import Head, scalar
from ..kinds.heads import LinearCall
from ..route.heads import dispatch
from ..route.memo import Asked, repeat
from .product import LOG_PROBS, LOGITS, P_LOG_P, PROBS, Lazy, Product
from .rules import OWN, dim_of, rule
from .tensor import BY_NAME, EITHER, EITHER_NAMES, RULES, TracedLogits, check_unchanged, traced

NOTHING = -(2**40)  # an ignore_index that no target is


def _as_given(product: Product) -> Any:
    """Autocast had its say when the head was called."""
    device = product.hidden.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def head_of(lazy: Lazy, name: str, dtype: torch.dtype | None = None) -> Head:
    """The head, for results of a type; without one, of the logits' type and at least float32."""
    check_unchanged(lazy)
    p = lazy.product
    # c tanh(s z) is k tanh(t z / k) with k = c and t = s c.
    scale = p.scale * p.cap if p.cap else p.scale
    head = Head(name, p.hidden, p.weight, p.bias, p.cap or None, scale, None)
    head.dtype = dtype or torch.promote_types(lazy.like.dtype, torch.float32)
    return head


def _run(
    head: Head,
    target: Tensor,
    weight: Tensor | None = None,
    asked: Asked | None = None,
    **settings: Any,
) -> Any:
    plain = {
        "probabilities": False,
        "reduction": "none",
        "ignore_index": NOTHING,
        "smoothing": 0.0,
        "z_loss": 0.0,
    }
    ready = head.run(LinearCall, target, weight, finish=tuple, **{**plain, **settings})
    return dispatch(ready, asked)


def _loss_dtype(lazy: Lazy) -> torch.dtype:
    return result_dtype(lazy.like.dtype, lazy.product.hidden)


def _cross_entropy(
    lazy: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    label_smoothing: Any = 0.0,
    kind: str = LOGITS,
    name: str = "cross_entropy",
    denominator: Any = None,
    **more: Any,
) -> Any:
    if not isinstance(lazy, Lazy) or isinstance(target, Lazy) or more:
        return NotImplemented
    like, product, shape = lazy.like, lazy.product, lazy.like.shape
    if (
        like.kind is not kind
        or like.factor != 1.0
        or like.at != (1 if len(shape) > 1 else 0)
        or size_average is not None
        or reduce is not None
        or reduction not in ("none", "mean", "sum")
        or (denominator is not None and reduction != "mean")
        or not isinstance(target, Tensor)
        or not (
            weight is None
            or (
                isinstance(weight, Tensor)
                and weight.shape == (product.classes,)
                and not weight.requires_grad
            )
        )
        or type(ignore_index) is not int
        or type(label_smoothing) not in (int, float)
        or not 0 <= label_smoothing <= 1
        or any(t is not None and t.device != product.hidden.device for t in (target, weight))
    ):
        return NotImplemented  # what is wrong is told of the logits in full
    rows = product.rows
    probabilities = target.shape == shape and target.is_floating_point()
    dtype = _loss_dtype(lazy)
    weight = None if weight is None else weight.to(result_dtype(weight.dtype, weight))
    if probabilities:
        if ignore_index >= 0 or kind is not LOGITS:
            return NotImplemented
        target = target.movedim(like.at, -1)
    elif target.shape != rows or target.dtype is not torch.int64:
        return NotImplemented
    settings = {
        "reduction": reduction,
        "ignore_index": ignore_index,
        "smoothing": float(label_smoothing),
    }
    with _as_given(product):
        check_unchanged(lazy)
        if probabilities or denominator is not None:
            return _checked(lazy, dtype, name, target, weight, settings, denominator, probabilities)
        tensors = tuple(t for t in (*product.tensors, target, weight) if t is not None)
        absent = product.bias is None, weight is None
        key = ("lazy", str(dtype), product.scale, product.cap, *absent, *settings.values())
        if (known := repeat(name, key, tensors)) is not None:
            return known
        return _checked(lazy, dtype, name, target, weight, settings, asked=Asked(key, tensors))


def _checked(
    lazy: Lazy,
    dtype: torch.dtype,
    name: str,
    target: Tensor,
    weight: Tensor | None,
    settings: dict[str, Any],
    denominator: Any = None,
    probabilities: bool = False,
    asked: Asked | None = None,
) -> Tensor:
    head = head_of(lazy, name, dtype)
    if head.check_target(target, weight, None if probabilities else settings["ignore_index"]):
        head.dtype = torch.promote_types(dtype, target.dtype)
    denominator = scalar(name, denominator, lazy.product.hidden)
    settings = {**settings, "denominator": denominator, "probabilities": probabilities}
    result: Tensor = _run(head, target, weight, asked=asked, **settings)[0]
    return result


rule(F.cross_entropy, losses.cross_entropy)(_cross_entropy)


@rule(F.nll_loss, losses.nll_loss)
def _nll_loss(
    lazy: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: Any = -100,
    reduce: Any = None,
    reduction: Any = "mean",
    **more: Any,
) -> Any:
    given = (lazy, target, weight, size_average, ignore_index, reduce, reduction)
    return _cross_entropy(*given, kind=LOG_PROBS, name="nll_loss", **more)


@rule(Tensor.gather, torch.gather)
def _gather(lazy: Any, dim: Any, index: Any, **more: Any) -> Any:
    """Of log-probabilities that of one class a row; of logits those of a few."""
    like, product = lazy.like, lazy.product
    if more or isinstance(index, Lazy) or dim_of(lazy, dim) != like.at:
        return NotImplemented
    shape = [*like.shape]
    shape[like.at] = index.shape[like.at] if index.dim() == len(shape) else -1
    if (
        index.dtype is not torch.int64
        or list(index.shape) != shape
        or index.device != product.hidden.device
    ):
        return NotImplemented
    if like.kind is LOGITS and 0 < shape[like.at] <= _few(product):
        return _logits_of(lazy, index.movedim(like.at, -1)).movedim(-1, like.at)
    if like.kind not in (LOG_PROBS, PROBS) or shape[like.at] != 1:
        return NotImplemented
    with _as_given(product):
        head = head_of(lazy, "gather")
        (losses_of_rows,) = _run(head, index.squeeze(like.at))
    found = -losses_of_rows if like.kind is LOG_PROBS else torch.exp(-losses_of_rows)
    return (like.factor * found).unsqueeze(like.at).to(like.dtype)


def _few(product: Product) -> int:
    """How many logits of a row may be computed one by one: they take rows of the weight."""
    return max(1, product.classes // max(product.hidden.shape[-1], 1))


def _logits_of(lazy: Lazy, index: Tensor) -> Tensor:
    """The logits of a few classes of each row, (..., k)."""
    p = lazy.product
    check_unchanged(lazy)
    wide = torch.promote_types(p.hidden.dtype, torch.float32)
    with _as_given(p):
        found = (p.hidden.unsqueeze(-2).to(wide) * F.embedding(index, p.weight).to(wide)).sum(-1)
        if p.bias is not None:
            found = found + p.bias[index]
        found = found * p.scale
        if p.cap:
            found = p.cap * torch.tanh(found)
    return found.to(lazy.like.dtype)


def _statistics(lazy: Lazy) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the entropy of each row."""
    _, lse, entropy, _ = _of_rows(lazy, "logsumexp", statistics=True)
    return lse, entropy


def _of_rows(lazy: Lazy, name: str, **settings: Any) -> Any:
    """What is asked of each row and depends on no target: the first class stands for one."""
    product = lazy.product
    with _as_given(product):
        head = head_of(lazy, name)
        first = torch.zeros(product.rows, dtype=torch.int64, device=product.hidden.device)
        return _run(head, first, **settings)


def _over_classes(lazy: Any, dim: Any) -> bool:
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    return isinstance(lazy, Lazy) and dim_of(lazy, dim) == lazy.like.at


@rule(torch.logsumexp, Tensor.logsumexp)
def _logsumexp(lazy: Any, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    if more or not _over_classes(lazy, dim) or lazy.like.kind is not LOGITS:
        return NotImplemented
    found = _statistics(lazy)[0].to(lazy.like.dtype)
    return found.unsqueeze(lazy.like.at) if keepdim else found


def _sums(mean: bool, *functions: Any) -> None:
    def handler(
        lazy: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **more: Any
    ) -> Any:
        if more or not _over_classes(lazy, dim) or lazy.like.kind is LOGITS:
            return NotImplemented
        like, product = lazy.like, lazy.product
        if like.kind is PROBS:
            return NotImplemented
        if like.kind is LOG_PROBS:
            (losses_of_rows,) = _of_rows(lazy, "sum", smoothing=1.0)
            found = -product.classes * losses_of_rows
        else:
            lse, entropy = _statistics(lazy)
            found = -entropy if like.kind is P_LOG_P else lse - entropy
        found = found * (like.factor / product.classes if mean else like.factor)
        found = found.to(dtype or like.dtype)
        return found.unsqueeze(like.at) if keepdim else found

    rule(*functions)(handler)


_sums(False, torch.sum, Tensor.sum)
_sums(True, torch.mean, Tensor.mean)


def _in_chunks(lazy: Lazy, reduce: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `reduce` gives of the last dimension of the logits, rows by rows, in the shape of the rows."""
    check_unchanged(lazy)
    product = lazy.product
    rows = product.rows
    flat = product.hidden.reshape(-1, product.hidden.shape[-1])
    size = max(1, BUDGET // max(product.classes * flat.element_size(), 1))
    parts = []
    with torch.no_grad(), _as_given(product):
        for chunk in flat.split(size):
            logits = F.linear(chunk, product.weight, product.bias) * product.scale
            if product.cap:
                logits = product.cap * torch.tanh(logits)
            parts.append(reduce(logits.to(lazy.like.dtype)))
    return tuple(
        torch.cat(each).reshape(*rows, *each[0].shape[1:]) for each in zip(*parts, strict=True)
    )


def _ordered(lazy: Any, dim: Any) -> bool:
    """Whether the best classes are those of the logits."""
    return (
        _over_classes(lazy, dim)
        and lazy.like.kind in (LOGITS, LOG_PROBS, PROBS)
        and lazy.like.factor > 0
        and lazy.product.hidden.numel() > 0
    )


@rule(torch.argmax, Tensor.argmax)
def _argmax(lazy: Any, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    if more or not _ordered(lazy, dim):
        return NotImplemented
    (found,) = _in_chunks(lazy, lambda x: (x.argmax(-1),))
    return found.unsqueeze(lazy.like.at) if keepdim else found


@rule(torch.topk, Tensor.topk)
def _topk(
    lazy: Any, k: Any, dim: Any = -1, largest: bool = True, sorted: bool = True, **more: Any
) -> Any:
    if more or not largest or not _ordered(lazy, dim) or not 0 < k <= lazy.product.classes:
        return NotImplemented
    if torch.is_grad_enabled() and lazy.requires_grad and k > _few(lazy.product):
        return NotImplemented
    return _best(lazy, lambda x: x.topk(k, sorted=sorted), torch.return_types.topk, keepdim=True)


@rule(torch.max, Tensor.max)
def _max(lazy: Any, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    if more or not _ordered(lazy, dim):
        return NotImplemented
    return _best(lazy, lambda x: x.max(-1), torch.return_types.max, keepdim)


def _best(lazy: Any, reduce: Callable[[Tensor], Any], kind: Any, keepdim: bool) -> Any:
    """Values and indices; the values of logits alone are known."""
    if lazy.like.kind is not LOGITS:
        return NotImplemented
    values, indices = _in_chunks(lazy, lambda x: tuple(reduce(x)))
    at = lazy.like.at
    if values.dim() == len(lazy.like.shape) - 1:
        if torch.is_grad_enabled() and lazy.requires_grad:
            values = _logits_of(lazy, indices.unsqueeze(-1)).squeeze(-1)
        found = (values, indices)
        return kind(tuple(v.unsqueeze(at) for v in found) if keepdim else found)
    if torch.is_grad_enabled() and lazy.requires_grad:
        values = _logits_of(lazy, indices)
    return kind(v.movedim(-1, at) for v in (values, indices))


@rule(F.kl_div, losses.kl_div)
def _kl_div(
    lazy: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: Any = "mean",
    log_target: Any = False,
    **more: Any,
) -> Any:
    if (
        more
        or size_average is not None
        or reduce is not None
        or not isinstance(lazy, Lazy)
        or not isinstance(target, Tensor)
        or lazy.like.kind is not LOG_PROBS
        or lazy.like.factor != 1.0
        or target.shape != lazy.like.shape
        or reduction not in ("batchmean", "sum", "mean")
    ):
        return NotImplemented
    lazily = isinstance(target, Lazy)
    total = (
        _of_two_heads(lazy, target, log_target) if lazily else _of_numbers(lazy, target, log_target)
    )
    if total is NotImplemented:
        return total
    shape = lazy.like.shape
    over = {"sum": 1, "batchmean": shape[0] if shape else 1, "mean": math.prod(shape)}[reduction]
    return total.to(lazy.like.dtype) / over


def _of_numbers(lazy: Lazy, target: Tensor, log_target: bool) -> Any:
    """The sum over all; of a target that needs no gradient."""
    if (
        target.requires_grad
        or not target.is_floating_point()
        or target.device != lazy.product.hidden.device
    ):
        return NotImplemented
    with _as_given(lazy.product):
        of = (target.exp() if log_target else target).movedim(lazy.like.at, -1)
        head = head_of(lazy, "kl_div")
        (cross,) = _run(head, of, probabilities=True, reduction="sum")
        own = (of * target.movedim(lazy.like.at, -1)) if log_target else torch.xlogy(of, of)
        return cross + torch.where(of != 0, own, 0).sum(
            dtype=torch.promote_types(own.dtype, torch.float32)
        )


def _of_two_heads(lazy: Lazy, target: Any, log_target: bool) -> Any:
    student, teacher = lazy.product, target.product
    if (
        target.like.kind is not (LOG_PROBS if log_target else PROBS)
        or target.like.factor != 1.0
        or target.like.at != lazy.like.at
        or student.scale != teacher.scale
        or student.cap
        or teacher.cap
        or any(t is not None and t.requires_grad for t in teacher.tensors)
    ):
        return NotImplemented
    check_unchanged(lazy)
    check_unchanged(target)
    with _as_given(student):
        return losses.linear_kl_div(
            student.hidden,
            student.weight,
            teacher.hidden,
            teacher.weight,
            linear_bias=student.bias,
            teacher_bias=teacher.bias,
            temperature=1 / student.scale,
            reduction="sum",
        )


def _as_method(function: Any) -> Any:
    rule, either = RULES.get(function), function in EITHER

    def method(self: TracedLogits, *args: Any, **kwargs: Any) -> Any:
        return traced(function, rule, either, (self, *args), kwargs)

    return method


def of_tensors() -> None:
    """What is traced is no tensor: it gets those methods of one that may be asked of it."""
    for function, rule_of in RULES.items():
        name = getattr(function, "__name__", "__get__")  # another library may have replaced it
        if name != "__get__":
            BY_NAME.setdefault(name, rule_of)
            if function in EITHER:
                EITHER_NAMES.add(name)
    for name in dir(Tensor):
        found = getattr(Tensor, name)
        if getattr(found, "__get__", None) in RULES or not callable(found):
            continue
        if (found in RULES and name not in OWN) or name in OPERATORS:
            setattr(TracedLogits, name, _as_method(found))


ARITHMETIC = "add sub mul truediv floordiv mod pow matmul"
OTHERS = "lt le gt ge eq ne invert abs and or xor float int bool contains"
OPERATORS = {f"__{side}{n}__" for side in ("", "r") for n in ARITHMETIC.split()}
OPERATORS |= {f"__{n}__" for n in OTHERS.split()}
