"""Tensors that are no plain ones, and modes that see what is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from bound import SHAPE, bound
from conftest import (
    EVERY_CASE,
    Case,
    parameters,
    parameters_reduced,
    run,
)
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

import fusedloss
from fusedloss.core import trace


@parameters_reduced()
def test_fake_and_meta_tensors(case: Case, reduction: str, generator: Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors, options = case.example(SHAPE, dtype, generator)
        expected = bound(case, options, reduction)(*tensors)
        with FakeTensorMode() as mode:
            fakes = tuple(mode.from_tensor(t) for t in tensors)
            settings = {
                k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in options.items()
            }
            results = [bound(case, settings, reduction)(*fakes)]
        moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in options.items()}
        results.append(bound(case, moved, reduction)(*(t.to("meta") for t in tensors)))
        for result in results:
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


class Tagged(Tensor):
    """Keeps its type through every function, and notes them."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@parameters()
def test_torch_function(case: Case, generator: Generator) -> None:
    tensors, options = case.example(SHAPE, torch.float32, generator)
    expected = bound(case, options)(*tensors)
    for k in range(len(tensors)):
        Tagged.seen.clear()
        mixed = [t.as_subclass(Tagged) if j == k else t for j, t in enumerate(tensors)]
        result = bound(case, options)(*mixed)
        assert Tagged.seen[0] is case.loss.function
        assert type(result) is Tagged
        assert_close(result.as_subclass(Tensor), expected)


class Counted(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_torch_function_mode_keeps_the_kernel(generator: Generator) -> None:
    """torch.device as a context and set_default_device are such modes."""
    x, y = torch.randn(2, 4, 5, generator=generator)
    with Counted() as mode:
        fusedloss.mse_loss(x, y)
    assert mode.seen[0] is fusedloss.mse_loss
    with torch.device("cpu"):
        assert trace.explain(fusedloss.mse_loss, x, y).kernel


@parameters()
def test_wrapper_subclass(case: Case, generator: Generator) -> None:
    """A subclass that holds other tensors and knows ATen's operators alone."""
    from torch.testing._internal.two_tensor import TwoTensor

    tensors, options = case.example(SHAPE, torch.float32, generator)
    wanted = case.loss.differentiable
    expected = run(bound(case, options), tensors, {}, wanted)
    inputs = tuple(
        TwoTensor(t.clone(), t.clone()).requires_grad_(k in wanted) for k, t in enumerate(tensors)
    )
    value = bound(case, options)(*inputs)
    value.backward()
    assert type(value) is TwoTensor
    assert_close(value.a.detach(), expected.value)
    for k, exact in zip(wanted, expected.grads, strict=True):
        assert_close(inputs[k].grad.a, exact)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_probabilities_of_jagged_tensors(
    reduction: str, smoothing: float, generator: Generator
) -> None:
    """Sequences of many lengths, whose classes are dimension 1; torch differentiates none."""
    rows = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 5])
    x, q = (
        torch.nested.nested_tensor_from_jagged(t, offsets).transpose(1, 2)
        for t in (rows[0], rows[1].softmax(1))
    )
    settings = {"reduction": reduction, "label_smoothing": smoothing}
    found = [f(x, q, **settings) for f in (fusedloss.cross_entropy, F.cross_entropy)]
    ours, theirs = (v.values() if v.is_nested else v for v in found)
    assert_close(ours, theirs)


def test_dispatch_mode_sees_aten(generator: Generator) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.namespaces: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.namespaces.add(func.namespace)
            return func(*args, **(kwargs or {}))

    x, y = torch.randn(2, 4, 5, generator=generator)
    with Names() as mode:
        fusedloss.mse_loss(x, y)
    assert mode.namespaces == {"aten"}


class Named(torch.nn.Parameter):
    """As libraries have them, to tell parameters apart."""


def of_subclass(kind: str, tensor: Tensor) -> Any:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.testing._internal.two_tensor import TwoTensor

    return {
        "collective": lambda: AsyncCollectiveTensor(tensor),
        "parameter": lambda: Named(tensor, requires_grad=False),
        "buffer": lambda: torch.nn.Buffer(tensor),
        "wrapper": lambda: TwoTensor(tensor.clone(), tensor.clone()),
    }[kind]()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["collective", "parameter", "buffer", "wrapper"])
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_one_argument_of_a_subclass(case: Case, kind: str, generator: Generator) -> None:
    """Right, or of a wrapper that meets plain tensors refused; no kernel reads what a wrapper lacks."""
    shape = (2, 3, 4) if case.kind == "dice" else SHAPE
    tensors, options = case.example(shape, torch.float64, generator)
    expected = case.function(*tensors, **options)
    names = [k for k, v in options.items() if isinstance(v, Tensor)]
    for key in (*range(len(tensors)), *names):
        given, settings = list(tensors), dict(options)
        where: Any = settings if key in names else given
        where[key] = of_subclass(kind, where[key])
        try:
            value = case.function(*given, **settings)
        except (RuntimeError, TypeError, NotImplementedError, AssertionError):
            assert kind == "wrapper", key
            continue
        value = value.a if kind == "wrapper" and hasattr(value, "a") else value
        assert_close(value, expected)
        if kind != "wrapper" and case.kind != "triplet":
            assert trace.explain(case.function, *given, **settings).kernel, key


@pytest.mark.parametrize("kind", ["collective", "parameter"])
def test_subclasses_learn(kind: str, generator: Generator) -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    x, y = torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 3])
    leaf = x.clone().requires_grad_()
    F.cross_entropy(leaf, y).backward()
    own: Any = Named(x) if kind == "parameter" else AsyncCollectiveTensor(x).requires_grad_()
    fusedloss.cross_entropy(own, y).backward()
    assert_close(torch.Tensor(own.grad), leaf.grad)
