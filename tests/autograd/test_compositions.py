"""Transforms of transforms, as functorch's own tests compose them, where tensors are smallest.

One sample, no dimensions, no elements: there a tensor is easily taken for a number, which has no batch
and makes tangents of float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CASES, Case, Options, Tensors, name_of, no_head
from torch import Generator, Tensor
from torch.func import jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import fusedloss
from fusedloss.front.definition import normal

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.04}
BATCH = 3

Function = Callable[..., Any]


def of_vjp(f: Function, primals: Tensors, along: Tensors) -> Tensors:
    value, pullback = vjp(f, *primals)
    return (value, *pullback(along[-1]))


def of_jvp(f: Function, primals: Tensors, along: Tensors) -> Tensors:
    return jvp(f, primals, along[:-1])


def _gradients(f: Function) -> Function:
    """As a function of the inputs and of what arrives."""
    return lambda *given: vjp(f, *given[:-1])[1](given[-1])


def vjpvjp(f: Function, primals: Tensors, along: Tensors) -> Tensors:
    return vjp(_gradients(f), *primals, along[-1])[1](along[:-1])


def jvpvjp(f: Function, primals: Tensors, along: Tensors) -> Tensors:
    values, tangents = jvp(_gradients(f), (*primals, along[-1]), along)
    return (*values, *tangents)


def jacobians(f: Function, primals: Tensors, along: Tensors) -> Tensors:
    positions = tuple(range(len(primals)))
    return (*jacfwd(f, positions)(*primals), jacfwd(jacrev(f))(*primals))


COMPOSED = (of_vjp, of_jvp, vjpvjp, jvpvjp)


def compositions(
    function: Function, tensors: Tensors, options: Options, wanted: tuple[int, ...], along: Tensors
) -> dict[str, Tensors]:
    """Each, of one sample and mapped over samples; and these with a class weight each, or one for all."""
    settings = {k: v for k, v in options.items() if not isinstance(v, Tensor)}
    weights = {k: v for k, v in options.items() if isinstance(v, Tensor)}

    def run(compose: Function, tensors: Tensors, weights: Options, along: Tensors) -> Tensors:
        def f(*given: Tensor) -> Tensor:
            new = dict(zip(wanted, given, strict=True))
            return function(*(new.get(k, t) for k, t in enumerate(tensors)), **settings, **weights)

        return compose(f, tuple(tensors[k] for k in wanted), along)

    found = {}
    stacked = tree_map(lambda t: torch.stack([t] * BATCH), (tensors, weights, along))
    # torch's own jacfwd takes no empty tensors.
    for compose in (*COMPOSED, jacobians)[: None if tensors[0].numel() else -1]:
        name, one = compose.__name__, functools.partial(run, compose)
        found[name] = one(tensors, weights, along)
        found[f"vmap {name}"] = vmap(one)(*stacked)
        if weights:
            shared = vmap(one, (0, None, 0))(stacked[0], weights, stacked[2])
            found[f"vmap {name}, shared"] = shared
    return found


def check(
    ours: Function,
    theirs: Function,
    tensors: Tensors,
    options: Options,
    wanted: tuple[int, ...],
    generator: Generator,
) -> None:
    """Values against those of PyTorch's function in float64, and types, which are the inputs'."""

    def typed(value: Any, dtype: torch.dtype) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    def found(function: Function, dtype: torch.dtype) -> dict[str, Tensors]:
        given = tree_map(functools.partial(typed, dtype=dtype), (tensors, options, along))
        return compositions(function, given[0], given[1], wanted, given[2])

    value = ours(*tensors, **options)
    shapes = [*(tensors[k].shape for k in wanted), value.shape]
    along = tuple(normal(shape, torch.bfloat16, generator) for shape in shapes)
    # Where the loss is a mean of nothing, its derivatives are not a number either.
    expected = {} if value.isnan().any() else found(theirs, torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        for name, results in found(ours, dtype).items():
            types = [name_of(t.dtype) for t in results]
            assert set(types) == {name_of(dtype)}, f"{name} of {dtype} has {types}"
            if expected:
                wide = tuple(t.double() for t in results)
                assert_close(
                    wide,
                    expected[name],
                    rtol=tolerance,
                    atol=tolerance,
                    msg=lambda words, name=name, dtype=dtype: f"{name} of {dtype}: {words}",
                )


def shapes(case: Case) -> list[tuple[int, ...]]:
    """One sample, none; and for losses of elements no dimension."""
    if case.kind == "sequences":
        return [(5,)]
    return [(5,), (0, 5)] if case.loss.rows else [(), (0,)]


DRAWN = [
    (case, shape, reduction)
    for case in filter(no_head, CASES)
    for shape in shapes(case)
    for reduction in ("none", "mean")
]


def huber(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """PyTorch's own has no forward mode over its backward."""
    d = (input - target).abs()
    losses = torch.where(d <= delta, 0.5 * d * d, delta * (d - 0.5 * delta))
    losses = losses if weight is None else losses * weight
    return losses if reduction == "none" else losses.mean()


def gaussian(
    input: Tensor,
    target: Tensor,
    var: Tensor,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """PyTorch's own looks at the values of `var`, which are above eps here."""
    constant = 0.5 * math.log(2 * math.pi) if full else 0.0
    losses = 0.5 * (var.log() + (input - target).square() / var) + constant
    return losses if reduction == "none" else losses.mean()


def soft_margin(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """PyTorch's own has no forward mode over its backward."""
    losses = F.softplus(-target * input)
    return losses if reduction == "none" else losses.mean()


def multilabel_soft_margin(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """PyTorch's own resizes an output of its log-sigmoid, and warns of it."""
    each = F.binary_cross_entropy_with_logits(input, target, weight, reduction="none")
    losses = each.mean(-1)
    return losses if reduction == "none" else losses.mean()


WRITTEN_OUT = {
    "huber_loss": huber,
    "gaussian_nll_loss": gaussian,
    "soft_margin_loss": soft_margin,
    "multilabel_soft_margin_loss": multilabel_soft_margin,
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("case", "shape", "reduction"), DRAWN, ids=[f"{c}-{list(s)}-{r}" for c, s, r in DRAWN]
)
def test_registry(case: Case, shape: tuple[int, ...], reduction: str, generator: Generator) -> None:
    loss = case.loss
    tensors, options = case.example(shape, torch.bfloat16, generator)
    options["reduction"] = reduction
    ours, theirs = loss.function, WRITTEN_OUT.get(loss.name, case.theirs)
    if case.kind == "sequences":  # theirs reads labels and lengths
        tensors, others = tensors[:1], tensors[1:]
        ours, theirs = (
            lambda x, f=f, **settings: f(x, *others, **settings)  # type: ignore[misc]
            for f in (ours, theirs)
        )
    check(ours, theirs, tensors, options, loss.differentiable, generator)


def logits_cross_entropy(h: Tensor, w: Tensor, t: Tensor, b: Tensor, **settings: Any) -> Tensor:
    return F.cross_entropy(F.linear(h, w, b), t, **settings)


def cross_entropy(h: Tensor, w: Tensor, t: Tensor, b: Tensor, **settings: Any) -> Tensor:
    return fusedloss.linear_cross_entropy(h, w, t, linear_bias=b, **settings)


def logits_log_prob(h: Tensor, w: Tensor, t: Tensor, b: Tensor, reduction: str) -> Tensor:
    log_p = -logits_cross_entropy(h, w, t, b, reduction="none")
    return log_p if reduction == "none" else log_p.mean()


def log_prob(h: Tensor, w: Tensor, t: Tensor, b: Tensor, reduction: str) -> Tensor:
    log_p = fusedloss.linear_log_prob(h, w, t, linear_bias=b).to(h.dtype)
    return log_p if reduction == "none" else log_p.mean()


def logits_kl_div(
    h: Tensor, w: Tensor, t: Tensor, b: Tensor, teacher: Tensor, reduction: str
) -> Tensor:
    x = F.linear(h, w, b)
    divergence = F.kl_div(x.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    losses = divergence + 0.5 * F.cross_entropy(x, t, reduction="none")
    return losses if reduction == "none" else losses.mean()


def kl_div(h: Tensor, w: Tensor, t: Tensor, b: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    return fusedloss.linear_kl_div(
        h, w, linear_bias=b, teacher_logits=teacher, target=t, hard_weight=0.5, reduction=reduction
    )


HEADS = {
    "linear_cross_entropy": (cross_entropy, logits_cross_entropy),
    "linear_cross_entropy, weight": (cross_entropy, logits_cross_entropy),
    "linear_log_prob": (log_prob, logits_log_prob),
    "linear_kl_div": (kl_div, logits_kl_div),
}


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(4,), (0, 4)], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str, shape: tuple[int, ...], reduction: str, generator: Generator) -> None:
    h, w, b, teacher = (
        normal(s, torch.bfloat16, generator) for s in (shape, (5, 4), (5,), (*shape[:-1], 5))
    )
    target = torch.randint(5, shape[:-1], generator=generator)
    options: Options = {"reduction": reduction}
    if "kl" in head:
        options["teacher"] = teacher
    if "weight" in head:
        options |= {"weight": b.abs() + 0.5, "label_smoothing": 0.1}
    check(*HEADS[head], (h, w, target, b), options, (0, 1, 3), generator)
