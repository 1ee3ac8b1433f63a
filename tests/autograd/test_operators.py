"""The operators that torch.compile keeps whole: what their fakes promise of results, on every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import CASES, Tensors, draw_incoming, leaves
from torch import Generator, Tensor
from torch.testing import assert_close

from fusedloss.autograd import operators
from fusedloss.autograd.operators import settings
from fusedloss.core import caches
from fusedloss.kinds.distill import DistillCall
from fusedloss.kinds.heads import LinearCall
from fusedloss.kinds.reduction import ReductionCall
from fusedloss.kinds.rows import RowsCall

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    # torch.compile's own, of any autograd function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

SHAPES = [(5,), (4, 5), (2, 5, 3, 2), (2, 5, 1, 3, 2), (0, 5), (2, 5, 0), (1, 1, 3)]
FLOAT32 = torch.float32


def turned(tensor: Tensor, *order: int) -> Tensor:
    """The same elements, with dimensions in this order in memory."""
    back = [order.index(d) for d in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(back)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The shape and the type of a tensor in all kinds of memory."""
    dims = tuple(range(tensor.dim()))
    found = {}
    if dims:
        found["expanded"] = tensor[:1].expand(tensor.shape)
        found["gaps"] = torch.stack((tensor, tensor), -1)[..., 0]
        found["offset"] = torch.cat((tensor[:1], tensor))[-len(tensor) :] if len(tensor) else tensor
    if len(dims) > 1:
        found["transposed"] = turned(tensor, *dims[::-1])
        found["channels last"] = turned(tensor, 0, *dims[2:], 1)
        found["expanded last"] = tensor[..., :1].expand(tensor.shape)
    if len(dims) > 2:
        found["rows inside"] = turned(tensor, 1, *dims[2:], 0)
        found["mixed"] = turned(tensor, *dims[2:], 0, 1)
    return found


def in_each_layout(tensors: tuple[Tensor | None, ...]) -> Iterator[tuple[Any, ...]]:
    """One tensor at a time in each of its layouts, the others contiguous."""
    yield tensors
    for k, tensor in enumerate(tensors):
        if tensor is not None and tensor.is_floating_point():
            for layout in layouts(tensor).values():
                yield (*tensors[:k], layout, *tensors[k + 1 :])


def given_to(
    calls: Callable[..., Any], generator: Generator
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Strides do not depend on the reduction: one of them meets all layouts."""
    for call, tensors in calls(generator):
        for given in in_each_layout(tensors) if call.reduction == "none" else [tensors]:
            yield call, given


def rows(generator: Generator) -> Iterator[tuple[Any, tuple[Tensor | None, ...]]]:
    for shape in SHAPES:
        x, q = torch.rand(2, *shape, generator=generator)
        classes = shape[min(len(shape) - 1, 1)]
        y = torch.randint(classes, shape[: len(shape) - 1][:1] + shape[2:], generator=generator)
        weight = torch.rand(classes, generator=generator)
        for reduction in ("none", "mean"):
            last = (reduction, -100)
            yield RowsCall("cross_entropy", False, *last, 0.1, FLOAT32), (x, y, None)
            yield RowsCall("cross_entropy", True, *last, 0.0, FLOAT32), (x, q, None)
            yield RowsCall("nll_loss", False, *last, 0.0, FLOAT32), (x, y, weight)


def triplets(generator: Generator) -> Iterator[tuple[Any, tuple[Tensor | None, ...]]]:
    for shape in ((5,), (4, 5), (2, 3, 4, 5), (0, 5)):
        a, p, n = torch.rand(3, *shape, generator=generator)
        for reduction in ("none", "mean"):
            call = ReductionCall("triplet_swap", (2.0, 1e-6, 1.0), reduction, FLOAT32)
            yield call, (a, p, n)
            yield call, (a[:1], p, n.sum(0)) if len(shape) > 1 else (a, p, n)


def heads(generator: Generator) -> Iterator[tuple[Any, tuple[Tensor | None, ...]]]:
    for n, k, dtype in ((4, 2, FLOAT32), (0, 2, FLOAT32), (4, 1, torch.bfloat16)):
        x, w, b, q = (
            torch.rand(s, generator=generator).to(dtype)
            for s in ((n, 3), (6, k, 3), (6, k), (n, 6, k))
        )
        y = torch.randint(6, (n, k), generator=generator)
        for reduction in ("none", "mean"):
            for soft, statistics in ((False, False), (True, False), (False, reduction == "none")):
                first = ("linear_cross_entropy", soft, reduction, -100, 0.1, 0.0, 0.0, 1.0)
                call = LinearCall(*first, statistics, 0, 0, False, dtype)
                yield call, (x, w, b, q if soft else y, None, None, None)


def distillations(generator: Generator) -> Iterator[tuple[Any, tuple[Tensor | None, ...]]]:
    for n in (4, 0):
        x, teacher_x, logits = (torch.rand(n, c, generator=generator) for c in (3, 2, 6))
        w, teacher_w = (torch.rand(6, 1, d, generator=generator) for d in (3, 2))
        y = torch.randint(6, (n, 1), generator=generator)
        for reduction in ("none", "mean"):
            first = ("linear_kl_div", False, reduction, -100, 0.0, 0.0, 0.0, 1.0, False, 0, 0)
            call = DistillCall(*first, False, FLOAT32, "js", 0.5, 1.0, 0.0, 1.0, 0.5)
            head, nothing = (x, w, None), (None, None, None)
            yield call, (*head, None, *nothing, *nothing, logits)
            yield call, (*head, y, *nothing, teacher_x, teacher_w, None, None)


def opcheck(name: str, *arguments: Any) -> None:
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.operator(name), arguments, test_utils=tests)


@pytest.mark.parametrize("calls", [rows, triplets], ids=lambda f: f.__name__)
def test_fakes_of_rows(calls: Callable[..., Any], generator: Generator) -> None:
    """Shapes, types and strides are the kernels' own."""
    for call, given in given_to(calls, generator):
        floats = [t is not None and t.is_floating_point() for t in given[: call.gradients]]
        opcheck(call.family, *given, [False] * len(floats), *settings(call))
        arrived = [torch.ones_like(t) for t in operators.run(call, given)], [True]
        opcheck(f"{call.family}_backward", *arrived, floats, *given, *settings(call))
        if call.stores_gradients:
            opcheck(call.family, *given, floats, *settings(call))


@pytest.mark.parametrize("calls", [heads, distillations], ids=lambda f: f.__name__)
def test_fakes_of_heads(calls: Callable[..., Any], generator: Generator) -> None:
    for call, given in given_to(calls, generator):
        floats = [t is not None and t.is_floating_point() for t in given[: call.gradients]]
        if call.reduction != "none":
            opcheck(call.family, *given, floats, *settings(call))
            continue
        nothing = [False] * call.gradients
        opcheck(call.family, *given, nothing, *settings(call))
        results = operators.operator(call.family)(*given, nothing, *settings(call))
        arrived = [torch.ones_like(t) for t in results], [True] * len(results)
        opcheck(f"{call.family}_backward", *arrived, floats, *given, *settings(call))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "dynamic"),
    [
        ("cross_entropy", False),
        ("cross_entropy", True),
        ("cross_entropy[probabilities]", False),
        ("nll_loss", False),
        ("triplet_margin_loss", False),
    ],
)
def test_the_default_backend_on_every_layout(key: str, dynamic: bool, generator: Generator) -> None:
    """It asserts sizes and strides of what an operator gives; gradients have those of eager calls."""
    case = next(c for c in CASES if c.loss.key == key)
    calls: list[Tensors] = []
    for shape in (4, 5), (2, 5, 3, 4):
        x, *rest = case.example(shape, torch.float32, generator)[0]
        calls += [(layout, *rest) for layout in layouts(x).values()]

    def losses(inputs: list[Tensors]) -> list[Tensor]:
        return [case.loss.function(*given, reduction="none") for given in inputs]

    torch._dynamo.reset()
    fast = torch.compile(losses, fullgraph=True, dynamic=dynamic)
    found = []
    incoming: list[Tensor] = []
    for function in (losses, fast):
        inputs = [leaves(given, (0,)) for given in calls]
        values = function(inputs)
        incoming = incoming or [draw_incoming(v, generator) for v in values]
        grads = torch.autograd.grad(values, [given[0] for given in inputs], incoming)
        found.append((*values, *grads))
    for eager, compiled in zip(*found, strict=True):
        assert_close(compiled, eager, check_stride=True)


def test_operators_are_named_by_our_version() -> None:
    """A graph in a cache on disk keeps the strides of the fakes that it was compiled with."""
    for name in ("rows", "reduction", "linear", "distill"):
        for each in (name, f"{name}_backward"):
            assert getattr(torch.ops.fusedloss, each).overloads() == [f"v{caches.version()}"]
