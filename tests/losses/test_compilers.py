"""What compiles a loss: torch.compile, compiled autograd, export, TorchScript."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from bound import SHAPE, Function, bound
from conftest import (
    CASES,
    FLOATS,
    HALVES,
    Case,
    draw_incoming,
    leaves,
    parameters,
    parameters_reduced,
    run,
)
from torch import Generator, Tensor
from torch.func import grad, vmap
from torch.testing import assert_close

import fusedloss
from fusedloss.autograd import operators
from fusedloss.core import trace
from fusedloss.front.definition import REGISTRY

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    # torch.compile's own, of any autograd function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


# Compilers


def compiled(function: Function, dynamic: bool = False, backend: str = "aot_eager") -> Function:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


@pytest.mark.one_in(9)
@parameters_reduced()
def test_compile(case: Case, reduction: str, generator: Generator) -> None:
    tensors, options = case.example(SHAPE, torch.float32, generator)
    wanted = case.loss.differentiable
    function = bound(case, options, reduction)
    incoming = draw_incoming(function(*tensors), generator)
    expected = run(function, tensors, {}, wanted, incoming)
    fast = compiled(function)
    found = run(fast, tensors, {}, wanted, incoming)
    assert_close(found.value, expected.value)
    assert_close(found.grads, expected.grads)
    assert_close(fast(*tensors), expected.value)


@pytest.mark.one_in(4)
@parameters()
def test_compile_with_dynamic_shapes(case: Case, generator: Generator) -> None:
    """One graph serves every size."""
    wanted = case.loss.differentiable
    fast = compiled(case.function, dynamic=True)
    tensors, options = case.example((4, 5), torch.float32, generator)
    # An ignore_index is a number of the call, and each number a graph of its own.
    numbers = {k: v for k, v in options.items() if not isinstance(v, Tensor)}
    run(fast, tensors, options, wanted)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 9):
            tensors, options = case.example((rows, 5), torch.float32, generator)
            options |= numbers
            expected = run(case.function, tensors, options, wanted)
            found = run(fast, tensors, options, wanted)
            assert_close(found.value, expected.value)
            assert_close(found.grads, expected.grads)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["mse_loss", "cross_entropy", "binary_cross_entropy"])
def test_inductor(key: str, generator: Generator) -> None:
    case = next(c for c in CASES if c.loss.key == key)
    tensors, options = case.example((8, 5), torch.float32, generator)
    expected = run(bound(case, options), tensors, {}, case.loss.differentiable)
    fast = compiled(bound(case, options), dynamic=True, backend="inductor")
    found = run(fast, tensors, {}, case.loss.differentiable)
    assert_close(found.value, expected.value)
    assert_close(found.grads, expected.grads)


def test_compiled_rows_run_the_kernel(generator: Generator) -> None:
    """And the kernel alone: what is saved for backward takes no more memory than the input and the target."""
    x = torch.randn(8, 5, generator=generator).requires_grad_()
    target = torch.arange(8) % 5
    fast = compiled(fusedloss.cross_entropy)
    before = trace.calls()["cross_entropy", "kernel"]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = fast(x, target)
    loss.backward()
    assert trace.calls()["cross_entropy", "kernel"] == before + 1
    assert sum(t.nbytes for t in saved) <= x.nbytes + target.nbytes


def test_compile_under_a_transform(generator: Generator) -> None:
    x, t = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    index = torch.tensor([0, 1, 2, 3])
    for function, other in ((fusedloss.mse_loss, t), (fusedloss.cross_entropy, index)):
        expected = grad(function)(x, other)
        assert_close(compiled(grad(function))(x, other), expected)
        mapped = vmap(grad(function))
        assert_close(compiled(mapped)(x, other), mapped(x, other))


def test_compiled_call_refuses_bad_input() -> None:
    x = torch.rand(2, 3)
    with pytest.raises(IndexError, match=r"target\[1\] = 7 is out of range for 3 classes"):
        compiled(fusedloss.cross_entropy)(x, torch.tensor([0, 7]))
    with pytest.raises(RuntimeError, match="should be between 0 and 1"):
        compiled(fusedloss.binary_cross_entropy)(x + 1, x)
    with pytest.raises(RuntimeError, match="should be between 0 and 1"):
        vmap(fusedloss.binary_cross_entropy)(x + 1, x)


# torch's own: it looks at what is saved.
@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_compiled_autograd(generator: Generator) -> None:
    """One graph is the backward of all losses that were called, repeated calls among them."""
    calls = []
    for case in {case.loss.key: case for case in CASES}.values():  # the last option of each
        # In float16 forward stores no gradient.
        for reduction, dtype in zip(("none", "mean", "mean"), FLOATS[1:], strict=True):
            tensors, options = case.example(SHAPE, dtype, generator)
            calls.append((bound(case, options, reduction), tensors, case.loss.differentiable))
    x, weight = (torch.randn(n, SHAPE[1], generator=generator) for n in (4, 7))
    y, teacher = torch.tensor([0, 6, 2, 2]), torch.randn(4, 7, generator=generator)
    for reduction in ("mean", "none"):
        head = functools.partial(fusedloss.linear_cross_entropy, reduction=reduction)
        calls.append((head, (x, weight, y), (0, 1)))
        distilled = functools.partial(
            fusedloss.linear_kl_div, teacher_logits=teacher, reduction=reduction
        )
        calls.append((distilled, (x, weight), (0, 1)))
    calls.append((lambda *t: fusedloss.linear_log_prob(*t)[0], (x, weight, y), (0, 1)))
    incoming: list[Tensor] = []

    def gradients(backward: Any) -> list[Tensor]:
        inputs = [leaves(tensors, wanted) for _, tensors, wanted in calls]
        values = [f(*given) for (f, _, _), given in zip(calls, inputs, strict=True)]
        incoming.extend(draw_incoming(v, generator) for v in values[len(incoming) :])
        with backward:
            torch.autograd.backward(values, incoming)
        pairs = zip(inputs, calls, strict=True)
        return [given[k].grad for given, (_, _, wanted) in pairs for k in wanted]  # type: ignore[misc]

    torch._dynamo.reset()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected = gradients(contextlib.nullcontext())
        found = gradients(torch._dynamo.compiled_autograd._enable(compiler))
        for a, e in zip(found, expected, strict=True):
            half = {"rtol": 1e-2, "atol": 2e-3} if a.dtype in HALVES else {}
            assert_close(a, e, equal_nan=True, **half)


class Wrapped(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


@parameters()
def test_export(case: Case, generator: Generator) -> None:
    """An exported program holds ATen operators alone: it runs where fusedloss is not installed."""
    tensors, options = case.example(SHAPE, torch.float32, generator)
    function = bound(case, options)
    rows = torch.export.Dim("rows", min=2)
    fixed = [t for t in options.values() if isinstance(t, Tensor) and t.shape[:1] == SHAPE[:1]]
    whole = case.loss.whole
    fixed = fixed or case.loss.indices in whole  # how many there are depends on the rows
    dims = (
        None if fixed or k in whole else {len(case.rows_at(k, 0)) - 1: rows}
        for k in range(len(tensors))
    )
    shapes = {"tensors": tuple(dims)}
    program = torch.export.export(Wrapped(function), tensors, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert getattr(node.target, "namespace", "aten") in ("aten", "_operator"), node.target
    other = case.loss.example((7, 5), torch.float32, generator)
    for given in (tensors, *([] if fixed else [other])):
        assert_close(program.module()(*given), function(*given))


def operator_calls() -> list[Any]:
    x, y, z = (torch.randn(4, 5).requires_grad_() for _ in range(3))
    index, weight = torch.tensor([0, 4, 2, 2]), torch.rand(5)
    probabilities = torch.rand(4, 5).requires_grad_()
    found = []
    for reduction, denominator in (("none", None), ("mean", None), ("mean", 2.5), ("sum", None)):
        rest = (reduction, 2, 0.1, torch.float32, 0.0, denominator)
        focal = (False, reduction, 2, 0.1, torch.float32, 1.5, denominator)
        triplet = ((2.0, 1e-6, 1.0), reduction, torch.float32, denominator)
        soft = (x, probabilities, weight, "cross_entropy", True, reduction, -100, 0.1)
        found += [
            ("rows", x, index, weight, "cross_entropy", False, *rest),
            ("rows", x, index, None, "nll_loss", False, *rest),
            ("rows", *soft, torch.float32, 0.0, denominator),
            ("rows", x, index, weight, "softmax_focal_loss", *focal),
            ("reduction", x, y, z, "triplet_swap", *triplet),
        ]
    return found


# torch 2.14's opcheck itself looks at the .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("call", operator_calls(), ids=lambda c: f"{c[0]}-{c[4]}")
def test_operators(call: Any) -> None:
    name, *arguments = call
    kind = next(k for k in operators.TENSORS if k.family == name)
    tensors, settings = arguments[:3], arguments[3:]
    call = kind(*settings)
    needed = [isinstance(t, Tensor) and t.requires_grad for t in tensors[: call.gradients]]
    for stored in ([False] * len(needed), needed) if call.stores_gradients else (needed[:0],):
        torch.library.opcheck(operators.operator(name), (*tensors, stored, *settings))
    (value,) = operators.run(call, tuple(tensors))
    backward = operators.operator(f"{name}_backward")
    given = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)
    arrived = [torch.ones_like(value).detach()], [True]
    torch.library.opcheck(backward, (*arrived, needed, *given))


# TorchScript


@pytest.mark.parametrize("name", ["MSELoss", "BCEWithLogitsLoss", "CrossEntropyLoss", "KLDivLoss"])
def test_torchscript_takes_the_functions_of_torch(name: str, generator: Generator) -> None:
    loss = next(row for row in REGISTRY.values() if row.module == name)
    tensors = loss.example(SHAPE, torch.float32, generator)
    ours = getattr(fusedloss.nn, name)()
    assert_close(torch.jit.script(ours)(*tensors), ours(*tensors))
    traced = torch.jit.trace(ours, tensors)
    assert_close(traced(*tensors), ours(*tensors))
