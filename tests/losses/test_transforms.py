"""What real code wraps around a loss: transforms, autograd's modes, compilers, subclasses."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd
from conftest import (
    CASES,
    FLOATS,
    HALVES,
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jvp, vjp, vmap
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

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

SHAPE = (4, 5)
BATCH = 3
Function = Callable[..., Tensor]


def bound(case: Case, options: Options, reduction: str = "mean") -> Function:
    return functools.partial(case.function, **options, reduction=reduction)


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


@parameters()
def test_hessian_is_that_of_torch(case: Case, generator: Generator) -> None:
    tensors, options = float64(case, generator)
    wanted = case.loss.differentiable
    positions = tuple(range(len(wanted)))
    given = [tensors[k] for k in wanted]
    theirs = functools.partial(case.loss.torch_function, **options, reduction="mean")
    ours = hessian(of_wanted(bound(case, options), tensors, wanted), positions)(*given)
    assert_close(ours, hessian(of_wanted(theirs, tensors, wanted), positions)(*given))


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
    for function in (case.function, case.loss.torch_function):
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
            (case.loss.torch_function, contextlib.nullcontext),
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
    with torch.autocast("cpu", torch.bfloat16):
        found = run(bound(case, weights), tensors, {}, wanted)
    assert found.value.dtype is torch.float32
    assert all(g.dtype is torch.bfloat16 for g in found.grads)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    if "lambda" in case.option:
        tolerance = {"rtol": 2e-2, "atol": 2e-2}  # the user's distance is taken in bfloat16
    assert_close(found.value, expected.value, equal_nan=True, **tolerance)
    grads = [g.float() for g in found.grads]
    assert_close(grads, list(expected.grads), rtol=1e-2, atol=1e-2, equal_nan=True)


# Compilers


def compiled(function: Function, dynamic: bool = False, backend: str = "aot_eager") -> Function:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


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
    shapes = {
        "tensors": tuple(None if fixed or k in whole else {0: rows} for k in range(len(tensors)))
    }
    program = torch.export.export(Wrapped(function), tensors, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert getattr(node.target, "namespace", "aten") in ("aten", "_operator"), node.target
    other = case.loss.example((7, 5), torch.float32, generator)
    for given in (tensors, *([] if fixed else [other])):
        assert_close(program.module()(*given), function(*given))


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


def operator_calls() -> list[Any]:
    x, y, z = (torch.randn(4, 5).requires_grad_() for _ in range(3))
    index, weight = torch.tensor([0, 4, 2, 2]), torch.rand(5)
    probabilities = torch.rand(4, 5).requires_grad_()
    found = []
    for reduction in ("none", "mean", "sum"):
        rest = (reduction, 2, 0.1, torch.float32)
        soft = (x, probabilities, weight, "cross_entropy", True, reduction, -100, 0.1)
        found += [
            ("rows", x, index, weight, "cross_entropy", False, *rest),
            ("rows", x, index, None, "nll_loss", False, *rest),
            ("rows", *soft, torch.float32),
            ("reduction", x, y, z, "triplet_swap", (2.0, 1e-6, 1.0), reduction, torch.float32),
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


# Tensor subclasses


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


# TorchScript


@pytest.mark.parametrize("name", ["MSELoss", "BCEWithLogitsLoss", "CrossEntropyLoss", "KLDivLoss"])
def test_torchscript_takes_the_functions_of_torch(name: str, generator: Generator) -> None:
    loss = next(row for row in REGISTRY.values() if row.module == name)
    tensors = loss.example(SHAPE, torch.float32, generator)
    ours = getattr(fusedloss.nn, name)()
    assert_close(torch.jit.script(ours)(*tensors), ours(*tensors))
    traced = torch.jit.trace(ours, tensors)
    assert_close(traced(*tensors), ours(*tensors))
