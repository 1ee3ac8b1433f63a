"""What code wraps around a loss: transforms, autograd's modes, checkpoints and hooks."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from bound import SHAPE, Function, bound
from conftest import (
    Case,
    Options,
    Tensors,
    draw_incoming,
    formula_path,
    leaves,
    parameters,
    parameters_reduced,
    run,
)
from torch import Generator, Tensor
from torch.func import functionalize, grad, hessian, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fusedloss

BATCH = 3


def of_wanted(function: Function, tensors: Tensors, wanted: Sequence[int]) -> Function:
    """A function of the tensors at `wanted` alone."""

    def call(*given: Tensor) -> Tensor:
        new = dict(zip(wanted, given, strict=True))
        return function(*(new.get(k, t) for k, t in enumerate(tensors)))

    return call


def float64(case: Case, generator: Generator) -> tuple[Tensors, Options]:
    return case.example(SHAPE, torch.float64, generator)


# torch.func


@parameters_reduced()
def test_grad_vjp_and_jvp(case: Case, reduction: str, generator: Generator) -> None:
    tensors, options = float64(case, generator)
    function, wanted = bound(case, options, reduction), case.loss.differentiable
    value = function(*tensors)
    incoming = draw_incoming(value, generator)
    expected = run(function, tensors, {}, wanted, incoming)
    call = of_wanted(function, tensors, wanted)
    given = [tensors[k] for k in wanted]

    result, pullback = vjp(call, *given)
    assert_close(result, expected.value)
    assert_close(pullback(incoming), expected.grads)

    tangents = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in given]
    result, tangent = jvp(call, tuple(given), tuple(tangents))
    assert_close(result, expected.value)
    along = sum((g * t).sum() for g, t in zip(expected.grads, tangents, strict=True))
    assert_close((tangent * incoming).sum(), along)

    def total(*given: Tensor) -> Tensor:
        return (call(*given) * incoming).sum()

    assert_close(grad(total, tuple(range(len(given))))(*given), expected.grads)


@parameters_reduced()
def test_functionalize(case: Case, reduction: str, generator: Generator) -> None:
    tensors, options = float64(case, generator)
    function, wanted = bound(case, options, reduction), case.loss.differentiable
    first = of_wanted(function, tensors, wanted[:1])

    def total(x: Tensor) -> Tensor:
        return first(x).sum()

    x = tensors[wanted[0]]
    assert_close(functionalize(first)(x), first(x))
    expected = grad(total)(x)
    for found in (functionalize(grad(total)), grad(functionalize(total))):
        assert_close(found(x), expected)


NO_FORWARD_OVER_REVERSE = {"soft_margin_loss"}  # in PyTorch


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's losses
@parameters()
def test_hessian_is_that_of_torch(case: Case, generator: Generator) -> None:
    tensors, options = float64(case, generator)
    wanted = case.loss.differentiable
    positions = tuple(range(len(wanted)))
    given = [tensors[k] for k in wanted]
    theirs = functools.partial(case.theirs, **options, reduction="mean")
    ours = hessian(of_wanted(bound(case, options), tensors, wanted), positions)(*given)
    of_theirs = of_wanted(theirs, tensors, wanted)
    if case.loss.name in NO_FORWARD_OVER_REVERSE:
        assert_close(ours, jacrev(jacrev(of_theirs, positions), positions)(*given))
    else:
        assert_close(ours, hessian(of_theirs, positions)(*given))


def batched(case: Case, generator: Generator) -> tuple[Tensors, Options]:
    """BATCH examples in one tensor each; the options belong to all of them."""
    examples = [case.loss.example(SHAPE, torch.float64, generator) for _ in range(BATCH)]
    options = case.loss.options[case.option](examples[0], generator)
    return tuple(torch.stack(t) for t in zip(*examples, strict=True)), options


def mapped_subsets(count: int) -> list[tuple[int, ...]]:
    return [s for n in range(1, count + 1) for s in itertools.combinations(range(count), n)]


@parameters_reduced()
def test_vmap_is_a_loop(case: Case, reduction: str, generator: Generator) -> None:
    stacked, options = batched(case, generator)
    function = bound(case, options, reduction)
    for mapped in mapped_subsets(len(stacked)):
        tensors = [t if k in mapped else t[0] for k, t in enumerate(stacked)]
        in_dims = tuple(0 if k in mapped else None for k in range(len(stacked)))
        rows = [[t[b] if k in mapped else t for k, t in enumerate(tensors)] for b in range(BATCH)]
        expected = torch.stack([function(*row) for row in rows])
        assert_close(vmap(function, in_dims)(*tensors), expected)


@parameters()
def test_per_sample_gradients(case: Case, generator: Generator) -> None:
    stacked, options = batched(case, generator)
    function, wanted = bound(case, options), tuple(case.loss.differentiable)
    found = vmap(grad(function, wanted))(*stacked)
    for b in range(BATCH):
        expected = run(function, tuple(t[b] for t in stacked), {}, wanted)
        assert_close(tuple(g[b] for g in found), expected.grads)


# Autograd and its modes


@parameters_reduced()
def test_second_derivatives_are_those_of_torch(
    case: Case, reduction: str, generator: Generator
) -> None:
    tensors, options = float64(case, generator)
    incoming = draw_incoming(bound(case, options, reduction)(*tensors), generator)
    found = []
    for function in (case.function, case.theirs):
        inputs = leaves(tensors, case.loss.differentiable)
        wanted = [inputs[k] for k in case.loss.differentiable]
        value = function(*inputs, **options, reduction=reduction)
        arrives = incoming.clone().requires_grad_()
        first = torch.autograd.grad(value, wanted, arrives, create_graph=True)
        mixed = sum((g * g.detach().cos()).sum() for g in first)
        second = torch.autograd.grad(mixed, [*wanted, arrives], materialize_grads=True)
        found.append((first, second))
    assert_close(found[0], found[1])


@parameters()
def test_gradients_have_a_graph_where_those_of_torch_have(case: Case, generator: Generator) -> None:
    """That of NLL too, which depends on its input by nothing: a penalty on gradients is 0, not an error."""
    tensors, options = float64(case, generator)
    for wanted in mapped_subsets(len(tensors)):
        if not set(wanted) <= set(case.loss.differentiable):
            continue
        found = []
        for function, path in (
            (case.theirs, contextlib.nullcontext),
            (case.function, contextlib.nullcontext),
            (case.function, formula_path),
        ):
            inputs = leaves(tensors, wanted)
            learned = [inputs[k] for k in wanted]
            with path():
                value = function(*inputs, **options)
            grads = torch.autograd.grad(value.sum(), learned, create_graph=True)
            rest = {"retain_graph": True, "allow_unused": True}
            found.append(
                [
                    torch.autograd.grad(g.sum(), learned, **rest) if g.requires_grad else None
                    for g in grads
                ]
            )
        for other in found[1:]:
            assert_close(other, found[0])


@pytest.mark.parametrize("reentrant", [False, True])
@parameters()
def test_checkpoint(case: Case, reentrant: bool, generator: Generator) -> None:
    tensors, options = case.example(SHAPE, torch.float32, generator)
    function, wanted = bound(case, options), case.loss.differentiable
    expected = run(function, tensors, {}, wanted)
    inputs = leaves(tensors, wanted)
    value = checkpoint(function, *inputs, use_reentrant=reentrant)
    value.backward()
    assert_close(value.detach(), expected.value, rtol=0, atol=0)
    assert_close(tuple(inputs[k].grad for k in wanted), expected.grads, rtol=0, atol=0)


@parameters()
def test_hooks(case: Case, generator: Generator) -> None:
    tensors, options = case.example(SHAPE, torch.float32, generator)
    wanted = case.loss.differentiable
    expected = run(bound(case, options), tensors, {}, wanted)
    inputs = leaves(tensors, wanted)
    seen: dict[int, Tensor] = {}

    def note(k: int, g: Tensor) -> Tensor:
        seen[k] = g
        return 2 * g

    for k in wanted:
        inputs[k].register_hook(functools.partial(note, k))
    value = bound(case, options)(*inputs)
    value.register_hook(lambda g: 3 * g)
    value.backward()
    for k, exact in zip(wanted, expected.grads, strict=True):
        assert_close(seen[k], 3 * exact)
        assert_close(inputs[k].grad, 6 * exact)


@parameters()
def test_no_grad_and_inference_mode(case: Case, generator: Generator) -> None:
    tensors, options = case.example(SHAPE, torch.float32, generator)
    function = bound(case, options)
    expected = function(*tensors)
    inputs = leaves(tensors, case.loss.differentiable)
    with torch.no_grad():
        assert not function(*inputs).requires_grad
    with torch.inference_mode():
        value = function(*inputs)
        inside = function(*(t.clone() for t in tensors))
    assert value.is_inference()
    for found in (value, inside):
        assert_close(found, expected, rtol=0, atol=0)


def test_frozen_trunk(generator: Generator) -> None:
    """Only what requires a gradient gets one, and nothing is computed for the rest."""
    trunk, head = torch.nn.Linear(5, 5), torch.nn.Linear(5, 3)
    trunk.requires_grad_(False)
    x = torch.randn(4, 5, generator=generator)
    loss = fusedloss.nn.CrossEntropyLoss()(head(trunk(x)), torch.tensor([0, 1, 2, 1]))
    loss.backward()
    assert trunk.weight.grad is None
    assert head.weight.grad is not None
    assert not fusedloss.nn.MSELoss()(trunk(x), x).requires_grad


def widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@parameters()
def test_autocast(case: Case, generator: Generator) -> None:
    """bfloat16 inside, float32 out; BCELoss too, which PyTorch refuses on a GPU."""
    tensors, options = case.example(SHAPE, torch.bfloat16, generator)
    wanted = case.loss.differentiable
    weights = {k: widened(v) for k, v in options.items()}
    wide = tuple(map(widened, tensors))
    expected = run(bound(case, weights), wide, {}, wanted)
    # The value of a head has as many digits as its logits.
    own = {"exact_logits": True} if case.loss.kind == "heads" else {}
    with torch.autocast("cpu", torch.bfloat16):
        found = run(bound(case, weights), tensors, own, wanted)
    assert found.value.dtype is torch.float32
    assert all(g.dtype is torch.bfloat16 for g in found.grads)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    if "lambda" in case.option:
        tolerance = {"rtol": 2e-2, "atol": 2e-2}  # the user's distance is taken in bfloat16
    assert_close(found.value, expected.value, equal_nan=True, **tolerance)
    grads = [g.float() for g in found.grads]
    assert_close(grads, list(expected.grads), rtol=1e-2, atol=1e-2, equal_nan=True)
