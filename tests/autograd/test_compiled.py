"""Compiled losses of large tensors: kernels, whose stored gradients backward gives away, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from conftest import CASES, FLOATS, Case, draw_incoming, name_of, parameters_reduced, run
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss.autograd import operators
from fusedloss.core import inductor, trace
from fusedloss.engines import cpu
from fusedloss.kinds import pointwise
from fusedloss.kinds.formula import FORMULAS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
ROWS, CLASSES = 512, 1024
Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(generator: Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, CLASSES, generator=generator).requires_grad_()
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def elements(generator: Generator) -> tuple[Tensor, Tensor]:
    x, t = torch.rand(2, ROWS, CLASSES, generator=generator)
    return x.requires_grad_(), t


DRAWN = {
    fusedloss.cross_entropy: logits,
    fusedloss.binary_cross_entropy: elements,
    fusedloss.mse_loss: elements,
}
each_loss = pytest.mark.parametrize("loss", DRAWN, ids=lambda f: f.__name__)


def gradient(function: Function, x: Tensor, *rest: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(function(x, *rest), x)
    return found


# Who else could see the memory


def twice_in_one_graph(loss: Function, x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * loss(x, t) + loss(x, t)


def squared_beside(loss: Function, x: Tensor, t: Tensor) -> Tensor:
    return loss(x, t) + x.square().mean()


def of_a_product(loss: Function, x: Tensor, t: Tensor) -> Tensor:
    return loss((x @ torch.eye(CLASSES) * 0.5).clamp(0, 1), t)


def of_a_sum(loss: Function, x: Tensor, t: Tensor) -> Tensor:
    """Both terms get the same gradient, one of them as a view."""
    return loss(0.5 * x + 0.5 * x.flatten().view_as(x), t)


def scaled_within(loss: Function, x: Tensor, t: Tensor) -> Tensor:
    return 3 * loss(x, t)


def recomputed(loss: Function, x: Tensor, t: Tensor) -> Tensor:
    result: Tensor = checkpoint(
        lambda x: loss((x * 1.0) @ torch.eye(CLASSES), t), x, use_reentrant=False
    )
    return result


def unwatched(loss: Function, x: Tensor, t: Tensor) -> Tensor:
    return loss(x, t)


@pytest.mark.slow
@each_loss
def test_gradients_by_the_default_backend(loss: Function, generator: Generator) -> None:
    """In all these graphs, by Inductor, with what arrives 1 and not 1, and accumulated."""
    x, t = DRAWN[loss](generator)
    ways = (
        *(unwatched, twice_in_one_graph, squared_beside, of_a_product, of_a_sum),
        *(scaled_within, recomputed),
    )
    for way in ways:
        fast = torch.compile(lambda x, t, way=way: way(loss, x, t), fullgraph=True, dynamic=False)
        expected = gradient(lambda x, t, way=way: way(loss, x, t), x, t)
        before = x.detach().clone()
        first, second = (gradient(fast, x, t) for _ in range(2))
        kept = first.clone()
        second.mul_(0)  # as an optimizer does to what it was given
        third = gradient(lambda x, t, fast=fast: 0.75 * fast(x, t), x, t)
        assert_close(first, expected, msg=lambda m, way=way: f"{way.__name__}: {m}")
        assert torch.equal(first, kept), way.__name__
        assert_close(third, 0.75 * expected, msg=lambda m, way=way: f"{way.__name__}: {m}")
        x.grad = None
        for _ in range(3):
            fast(x, t).backward()
        assert_close(x.grad, 3 * expected)
        x.grad = None
        assert torch.equal(x.detach(), before)


@pytest.mark.slow
@each_loss
def test_the_stored_gradient_is_given_away(loss: Function, generator: Generator) -> None:
    """And by no backward whose graph is kept, which would find it changed."""
    x, t = DRAWN[loss](generator)
    expected = gradient(loss, x, t)
    # Inductor's cache on disk does not tell graphs with buffers that are donated from others.
    uncached = torch._inductor.config.patch(fx_graph_cache=False)
    for donates in (True, False):
        torch._dynamo.reset()
        with uncached, torch._functorch.config.patch(donated_buffer=donates):
            fast = torch.compile(loss, fullgraph=True, dynamic=False)
            saved: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda s, saved=saved: saved.append(s.data_ptr()) or s, lambda s: s
            ):
                value = fast(x, t)
            value.backward()
            assert (x.grad.data_ptr() in saved) is donates  # type: ignore[union-attr]
            assert_close(x.grad, expected)
            x.grad = None
            if not donates:
                value = fast(x, t)
                for k in range(1, 4):
                    value.backward(retain_graph=k < 3)
                    assert_close(x.grad, k * expected)
                x.grad = None


@pytest.mark.slow
@each_loss
def test_bfloat16_is_stored_and_rounded_once(loss: Function, generator: Generator) -> None:
    """The called loss's bits, whatever arrives; given away where it is 1."""
    x, t = DRAWN[loss](generator)
    x = x.detach().bfloat16().requires_grad_()
    t = t.bfloat16() if t.is_floating_point() else t
    fast = torch.compile(loss, fullgraph=True, dynamic=False)
    for scale in (1.0, 0.25, 0.3, -3.0):
        expected = gradient(lambda x, t, by=scale: by * loss(x, t), x, t)
        for _ in range(2):
            assert torch.equal(gradient(lambda x, t, by=scale: by * fast(x, t), x, t), expected)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda s: saved.append(s.data_ptr()) or s, lambda s: s
    ):
        value = fast(x, t)
    value.backward()
    assert x.grad is not None and x.grad.data_ptr() in saved


@pytest.mark.parametrize("built", [True, False])
def test_a_graph_has_operators_where_there_are_kernels(
    built: bool, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[str] = []

    def seen(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph

    monkeypatch.setattr(cpu, "problem", lambda: None if built else "not built")
    x, t = logits(generator)
    w = torch.randn(CLASSES, 8, generator=generator)
    for function, given in (
        (fusedloss.cross_entropy, (x, t)),
        (fusedloss.triplet_margin_loss, (x, x.detach().flip(0), x.detach().flip(1))),
        (fusedloss.linear_cross_entropy, (x[:, :8], w, t)),
    ):
        graphs.clear()
        found = torch.compile(function, backend=seen, fullgraph=True)(*given)
        assert_close(found, function(*given))
        (graph,) = graphs
        assert ("fusedloss" in graph) is built


@pytest.mark.slow
def test_compiled_autograd_gives_nothing_away(generator: Generator) -> None:
    x, t = logits(generator)
    expected = gradient(fusedloss.cross_entropy, x, t)
    for function in (fusedloss.cross_entropy, torch.compile(fusedloss.cross_entropy)):
        x.grad = None
        for k in range(1, 3):
            value = function(x, t)
            with torch._dynamo.compiled_autograd._enable(torch.compile()):
                value.backward()
            assert_close(x.grad, k * expected)


SCRIPT = """
import json, sys, torch
import torch._dynamo
import fusedloss
generator = torch.Generator().manual_seed(0)
x = torch.rand(512, 1024, generator=generator).requires_grad_()
t, y = torch.rand(512, 1024, generator=generator), torch.randint(1024, (512,), generator=generator)
def losses(x, t, y):
    return fusedloss.cross_entropy(x, y), fusedloss.binary_cross_entropy(x, t)
fast = torch.compile(losses, fullgraph=True)
saved, found = [], []
for factor in (1, 1, 0.5):
    for k in (0, 1):
        with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s.data_ptr()) or s, lambda s: s):
            value = fast(x, t, y)[k]
        (factor * value).backward()
        found.append((value.item(), x.grad.double().square().sum().item()))
        x.grad = None
print(json.dumps((found, torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])))
"""


@pytest.mark.slow
def test_a_cached_graph_gives_the_same(tmp_path: Path) -> None:
    """Another process finds the graphs of the first on disk."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    found = []
    for hits in (0, 1):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        values, cached = json.loads(done.stdout)
        assert cached == hits
        found.append(values)
    assert found[0] == found[1]
    assert found[0][:2] == found[0][2:4]


# Which path a compiled call takes


def counted(case: Case, rows: int, generator: Generator, fast: Function) -> int:
    """Runs the case on so many rows, and says how often it has run its kernel."""
    tensors, options = case.example((rows, 16), torch.float32, generator)
    before = trace.by_kernel[case.loss.name]
    fast(
        *(
            t.requires_grad_() if k in case.loss.differentiable else t
            for k, t in enumerate(tensors)
        ),
        **options,
    )
    return trace.by_kernel[case.loss.name] - before


def test_large_tensors_take_the_kernel_and_small_ones_the_formula(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "LEAST", 128)
    case = next(c for c in CASES if c.loss.name == "mse_loss")
    fast = torch.compile(fusedloss.mse_loss, backend="aot_eager", dynamic=False)
    assert [counted(case, rows, generator, fast) for rows in (4, 7, 8, 9)] == [0, 0, 1, 1]


def graphs() -> int:
    found: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


@pytest.mark.one_in(2)
@pytest.mark.parametrize("key", sorted({c.loss.key for c in CASES if c.loss.kind != "heads"}))
def test_as_many_graphs_as_pytorch(
    key: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ten batch sizes, on both sides of the size from which the kernel runs."""
    monkeypatch.setattr(pointwise, "LEAST", 128)
    case = next(c for c in CASES if c.loss.key == key)
    compiled = []
    for function in (case.loss.torch_function, case.function):
        torch._dynamo.reset()
        before = graphs()
        fast = torch.compile(function, backend="eager")
        for rows in (32, 31, 8, 7, 9, 64, 3, 5, 100, 30):
            if case.kind == "sequences":
                pytest.skip("its batch sizes are those of lengths, which are read")
            counted(case, rows, generator, fast)
        compiled.append(graphs() - before)
    theirs, ours = compiled
    assert ours <= max(theirs, 2)  # one of the first size, one of all


def of_elements(case: Case) -> bool:
    return case.kind == "pointwise"


@pytest.mark.one_in(6)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@parameters_reduced(of_elements)
def test_the_operator_of_elements(
    case: Case,
    reduction: str,
    dtype: torch.dtype,
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the kernel gives when it is called; half types are not rounded twice. One graph serves all sizes."""
    monkeypatch.setattr(pointwise, "LEAST", 1)
    if reduction == "none":
        pytest.skip("it takes the formula, which losses/test_compilers.py compiles")
    fast = torch.compile(case.function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in (4, 5), (7, 5):
        tensors, options = case.example(shape, dtype, generator)
        options["reduction"] = reduction
        incoming = draw_incoming(case.function(*tensors, **options), generator)
        expected = run(case.function, tensors, options, case.loss.differentiable, incoming)
        found = run(fast, tensors, options, case.loss.differentiable, incoming)
        assert_close(found.value, expected.value)
        assert_close(found.grads, expected.grads)


@pytest.mark.parametrize("shapes", [((4, 5), (4, 1)), ((4, 1), (4, 5)), ((3, 4, 5), (5,))], ids=str)
def test_operands_that_broadcast(
    shapes: tuple[tuple[int, ...], ...], generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "LEAST", 1)
    fast = torch.compile(fusedloss.huber_loss, fullgraph=True, backend="aot_eager")
    tensors = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    with pytest.warns(UserWarning, match="broadcasting"):
        expected = run(fusedloss.huber_loss, tensors, {}, (0, 1))
    found = run(fast, tensors, {}, (0, 1))
    assert_close(found.value, expected.value)
    assert_close(found.grads, expected.grads, check_stride=True)


def test_the_operator_refuses_what_the_call_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "LEAST", 1)
    x = torch.rand(2, 3)
    x[1, 2] = 1.5
    messages = []
    for function in (
        F.binary_cross_entropy,
        torch.compile(F.binary_cross_entropy, backend="aot_eager"),
    ):
        with fusedloss.patched(), pytest.raises(RuntimeError, match=r"input\[1, 2\] = 1.5") as told:
            function(x, x)
        messages.append(str(told.value))
    assert messages[0] == messages[1]


def test_derivatives_of_the_operator(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """opcheck runs it under autograd, and as AOTAutograd traces it; a double backward takes the formula."""
    monkeypatch.setattr(pointwise, "LEAST", 1)
    x, t = torch.rand(2, 4, 5, generator=generator)
    for formula, params in (("mse", ()), ("bce", ()), ("huber", (0.3,))):
        for reduction, parts, of in (
            ("mean", None, None),
            ("mean", 3, None),
            ("mean", None, 2.5),
            ("sum", None, None),
        ):
            for leaf in (x.clone().requires_grad_(), x.t().contiguous().t().requires_grad_()):
                settings = (
                    formula,
                    params,
                    reduction,
                    parts,
                    torch.float32,
                    False,
                    None,
                    "a_loss",
                    of,
                )
                needed = [True] + [False] * (FORMULAS[formula].derivatives - 1)
                given = (leaf, t, None, None, t)
                torch.library.opcheck(operators.operator("pointwise"), (*given, needed, *settings))
                arrived = [torch.ones(())], [True]
                given = tuple(g if g is None else g.detach() for g in given)
                backward = operators.operator("pointwise_backward")
                torch.library.opcheck(backward, (*arrived, needed, *given, *settings))
    torch.library.opcheck(operators.operator("scaled"), (x, torch.tensor(2.0), False))


def test_weights_that_change_in_place_and_layouts_and_options_in_turn(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "LEAST", 1)
    fast = torch.compile(fusedloss.binary_cross_entropy_with_logits, backend="aot_eager")
    x, t = torch.randn(2, 8, 6, generator=generator)
    weight, pos_weight = torch.rand(8, 6, generator=generator), torch.rand(6, generator=generator)
    options: tuple[dict[str, Any], ...] = (
        {"weight": weight},
        {"pos_weight": pos_weight},
        {"weight": weight, "pos_weight": pos_weight, "reduction": "sum"},
    )
    for _ in range(3):
        for layout in (x, x.t().contiguous().t(), x[:, ::2]):
            for given in options if layout.shape == x.shape else ({},):
                leaf = layout.detach().requires_grad_()
                target = t[:, : leaf.shape[1]]
                found = fast(leaf, target, **given)
                expected = fusedloss.binary_cross_entropy_with_logits(leaf, target, **given)
                assert_close(found, expected)
                assert_close(*(torch.autograd.grad(v, leaf)[0] for v in (found, expected)))
        weight.mul_(2)
        pos_weight.add_(1)


def test_a_break_of_the_graph(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "LEAST", 1)
    x, t = torch.randn(2, 8, 6, generator=generator)
    x.requires_grad_()

    def step(x: Tensor, t: Tensor) -> Tensor:
        first = fusedloss.mse_loss(x, t)
        torch._dynamo.graph_break()
        return first + fusedloss.l1_loss(x, t)

    fast = torch.compile(step, backend="aot_eager")
    assert_close(fast(x, t), step(x, t))
    assert_close(gradient(fast, x, t), gradient(step, x, t))


def test_the_least_is_large_enough_for_the_tests() -> None:
    """What the tests above take for large is."""
    assert max(pointwise.LEAST, inductor.LEAST) <= ROWS * CLASSES
    assert F.mse_loss is not fusedloss.mse_loss
