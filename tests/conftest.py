"""What the tests share: the registry as parameters, one way to run a call, and the error bound."""

from __future__ import annotations

import contextlib
import gc
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import sequences
import torch
from torch import Generator, Tensor

from fusedloss import engines
from fusedloss.core import torch_state, trace
from fusedloss.core.reduce import wide
from fusedloss.engines import cpu
from fusedloss.engines.cpu import load
from fusedloss.front.definition import REGISTRY, Loss
from fusedloss.route import memo

pytest_plugins = ["problems", "records_summary"]

FLOATS = load.FLOATS
HALVES = (torch.bfloat16, torch.float16)

# Where the reference is no wider than what it judges, its own sums of thousands of terms count.
FLOAT64_ROUNDINGS = 8192

# What test_gpu.py sets in the processes that it starts: "interpreted", with TRITON_INTERPRET=1, or "cuda".
GPU = os.environ.get("FUSEDLOSS_TEST_GPU", "")
DEVICE = "cuda" if GPU == "cuda" else "cpu"
if GPU == "interpreted":
    INTERPRETED = contextlib.ExitStack()  # to the end of the process
    INTERPRETED.enter_context(engines.interpreted())

tells_what_changed = pytest.mark.skipif(
    not torch_state.unpacks_saved, reason="this torch does not tell which saved tensor was changed"
)
NAMES = {loss.name for loss in REGISTRY.values()} & set(dir(torch.nn.functional))
ORIGINALS = [getattr(torch.nn.functional, name) for name in sorted(NAMES)]
Tensors = tuple[Tensor, ...]
Options = dict[str, Any]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    for expected in (
        "'mean' divides the total loss by both",  # kl_div, as PyTorch's does
        "`torch.jit.script` is deprecated",  # torch itself, on its first forward-mode derivative
        "Guards may run slower on Python 3.13.0",  # torch.compile there
        "Profiler clears events at the end",  # torch 2.10
    ):
        config.addinivalue_line("filterwarnings", f"ignore:.*{expected}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which of many alike are left to `make nightly`, and which to other processes.

    A process that interprets kernels, which is slow, runs one in so many tests.
    """

    def first_of(item: pytest.Item, every: int) -> bool:
        return zlib.crc32(item.nodeid.encode()) % every == 0

    every = int(os.environ.get("FUSEDLOSS_TEST_EVERY", "1"))
    items[:] = [i for i in items if first_of(i, every)]
    for item in items:
        if (one_in := item.get_closest_marker("one_in")) and not first_of(item, *one_in.args):
            item.add_marker(pytest.mark.nightly)


def pytest_collection_finish() -> None:
    """Tens of thousands of tests stay to the end: no collection of garbage need look at them."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what counts its references at exit finds them given back


def pytest_report_header() -> str:
    kernels = f"Triton, {GPU}" if GPU else cpu.problem() or load.path().name
    return f"kernels: {kernels}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The suite runs in as many processes as there are cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """What one test sets for the process, another would find."""
    yield
    left = [f.__name__ for f in ORIGINALS if f.__code__.co_filename != f.__globals__["__file__"]]
    assert not left, f"left patched: {left}"
    assert torch.get_default_dtype() is torch.float32


@pytest.fixture(autouse=True)
def _nothing_known_of_other_parts(request: pytest.FixtureRequest) -> None:
    """Tests change the sizes that launches are laid out by, and the products of heads."""
    if GPU or request.path.parent.name == "heads":
        memo.known.clear()


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> Generator:
    """Seeded by the test's name: its numbers do not depend on which tests ran before."""
    return Generator().manual_seed(zlib.crc32(request.node.name.encode()))


@dataclass(frozen=True)
class Case:
    """A row of the registry with one of its option sets."""

    loss: Loss
    option: str

    def __str__(self) -> str:
        return f"{self.loss.key}-{self.option}"

    @property
    def kind(self) -> str:
        return self.loss.kind

    def takes(self, shape: Sequence[int]) -> bool:
        if self.kind == "sequences" and 0 in shape:
            return False  # PyTorch refuses them
        return self.loss.dims is None or len(shape) <= self.loss.dims

    @property
    def function(self) -> Callable[..., Tensor]:
        return self.loss.reduced

    @property
    def theirs(self) -> Callable[..., Tensor]:
        """PyTorch's function, or one that has the derivatives which it lacks."""
        return sequences.ctc_loss if self.kind == "sequences" else self.loss.reference

    def rows_at(self, k: int, rows: Any) -> tuple[Any, ...]:
        """The place of these rows of the result in argument k."""
        return (slice(None), rows) if self.kind == "sequences" and k == 0 else (rows,)

    @property
    def reductions(self) -> Sequence[str]:
        return self.loss.reductions or ("none",)

    @property
    def of_rows(self) -> list[int]:
        """The differentiable arguments with a row for each row of the result."""
        return [k for k in self.loss.differentiable if k not in self.loss.whole]

    def example(
        self, shape: Sequence[int], dtype: torch.dtype, generator: Generator
    ) -> tuple[Tensors, Options]:
        drawn = self.loss.example(tuple(shape), dtype, generator)
        tensors = tuple(t.to(DEVICE) for t in drawn)
        options = self.loss.options[self.option](tensors, generator)
        return tensors, {
            k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()
        }


EVERY_CASE = [Case(loss, option) for loss in REGISTRY.values() for option in loss.options]
# An overlap is of whole images: what is asked of rows and elements is asked of it in losses/test_overlaps.py.
CASES = [case for case in EVERY_CASE if case.kind != "dice"]
OVERLAPS = [case for case in EVERY_CASE if case.kind == "dice"]


def no_head(case: Case) -> bool:
    return case.kind != "heads"


def parameters(keep: Callable[[Case], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Registry rows x options."""
    cases = [case for case in CASES if keep(case)]
    return pytest.mark.parametrize("case", cases, ids=str)


def parameters_reduced(keep: Callable[[Case], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Registry rows x options x reductions."""
    pairs = [(case, r) for case in CASES if keep(case) for r in case.reductions]
    return pytest.mark.parametrize(
        ("case", "reduction"), pairs, ids=[f"{case}-{reduction}" for case, reduction in pairs]
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)


def formula_path() -> contextlib.AbstractContextManager[None]:
    """Inside, every call takes the formula."""
    return trace.forced("the test asks for it")


class Outcome(NamedTuple):
    value: Tensor
    grads: tuple[Tensor, ...]

    def named(self) -> list[tuple[str, Tensor]]:
        return [("value", self.value), *((f"gradient {k}", g) for k, g in enumerate(self.grads))]


def leaves(tensors: Tensors, wanted: Sequence[int]) -> Tensors:
    """The same memory and strides as new leaves, those at `wanted` requiring gradients."""
    return tuple(t.detach().requires_grad_(k in wanted) for k, t in enumerate(tensors))


def run(
    function: Callable[..., Tensor],
    tensors: Tensors,
    options: Options,
    wanted: Sequence[int] = (),
    incoming: Tensor | None = None,
) -> Outcome:
    """The value, and the gradients of the tensors at `wanted`. The inputs must stay as they are."""
    inputs = leaves(tensors, wanted)
    given = [t.detach() for t in (*inputs, *options.values()) if isinstance(t, Tensor)]
    before = [t.clone() for t in given]
    value = function(*inputs, **options)
    grads: Tensors = ()
    if wanted:
        arrives = torch.ones_like(value) if incoming is None else incoming
        grads = torch.autograd.grad(value, [inputs[k] for k in wanted], arrives)
    for tensor, copy in zip(given, before, strict=True):
        assert same_bits(tensor, copy), "an input was written to"
    return Outcome(value.detach(), grads)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, with NaN equal to itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def assert_same_bits(actual: Outcome, expected: Outcome) -> None:
    for (name, a), (_, e) in zip(actual.named(), expected.named(), strict=True):
        assert same_bits(a, e), f"{name}: {int((a != e).sum())} of {a.numel()} elements differ"


def draw_incoming(value: Tensor, generator: Generator) -> Tensor:
    """A gradient to send back through `value`."""
    return torch.randn(value.shape, dtype=torch.float64, generator=generator).to(value)


class Reference(NamedTuple):
    """The formula in float64, and the scale of the rounding errors to expect beside it."""

    exact: Outcome
    scale: Outcome  # for one rounding


def reference(
    case: Case,
    tensors: Tensors,
    options: Options,
    wanted: Sequence[int],
    incoming: Tensor | None,
    generator: Generator,
) -> Reference:
    """The scale is that of the largest result, and what a rounding of the inputs does to it."""
    compute = wide(*(t for t in tensors if t.is_floating_point()))
    if case.kind == "heads":
        compute = tensors[0].dtype  # logits or their gradient are of the input's type
    eps = torch.finfo(compute).eps
    inputs: Tensors = tuple(_widened(t, tensors[0].dtype) for t in tensors)
    settings = {name: _widened(v, tensors[0].dtype) for name, v in options.items()}
    arrives = None if incoming is None else incoming.double()
    with formula_path():
        exact = run(case.function, inputs, settings, wanted, arrives)
        unreduced = "none" if "none" in case.reductions else case.reductions[0]
        losses = case.function(*inputs, **{**settings, "reduction": unreduced})
        # Gradients may cancel: the scale is at least that of a slope of 1.
        parts = {"mean": losses.numel(), "batchmean": inputs[0].shape[:1].numel()}
        slope = 1.0 if arrives is None else _greatest(arrives)
        slope /= max(parts.get(options.get("reduction", "mean"), 1), 1)
        scale = Outcome(
            torch.full_like(exact.value, eps * _greatest(exact.value)),
            tuple(torch.full_like(g, eps * max(_greatest(g), slope)) for g in exact.grads),
        )
        for _ in range(2):  # the effects of two arguments can cancel, but not twice
            ignored = settings.get("ignore_index")
            moved = tuple(_moved(t, eps, generator, ignored) for t in inputs)
            shifted = run(case.function, moved, settings, wanted, arrives)
            for (_, s), (_, a), (_, b) in zip(
                scale.named(), shifted.named(), exact.named(), strict=True
            ):
                s += (a - b).abs()
    return Reference(exact, scale)


def _moved(tensor: Tensor, eps: float, generator: Generator, ignored: int | None) -> Tensor:
    """One or two roundings towards 0 of each element: a probability stays one, and so does what is ignored."""
    if not tensor.is_floating_point():
        return tensor
    steps = torch.randint(1, 3, tensor.shape, generator=generator)
    moved = tensor * (1 - eps * steps.to(tensor.device))
    return moved if ignored is None else torch.where(tensor == ignored, tensor, moved)


def _greatest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if callable(value) and not isinstance(value, torch.nn.Module):
        # A distance of the user's own is taken in the type of the inputs, whatever follows.
        return lambda a, b: value(a.to(dtype), b.to(dtype)).double()
    return value


def assert_exact(actual: Outcome, expected: Reference, roundings: int = 8) -> None:
    """So many roundings in the type computed in, and the one to the type of the result."""
    for (name, a), (_, e), (_, s) in zip(
        actual.named(), expected.exact.named(), expected.scale.named(), strict=True
    ):
        assert a.shape == e.shape, f"{name}: shape {list(a.shape)}, not {list(e.shape)}"
        info = torch.finfo(a.dtype)
        if a.dtype is torch.float64:
            roundings = FLOAT64_ROUNDINGS
        stored = info.eps / 2 if a.dtype in HALVES else 0.0
        bound = roundings * s + stored * e.abs() + info.smallest_normal * info.eps
        error = (a.double() - e).abs()
        bad = ~((error <= bound) | (a == e.to(a.dtype)) | (a.isnan() & e.isnan()))
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}{list(at)} = {a[at].item():.9g}, not {e[at].item():.9g}: off by "
                f"{error[at].item():.3g}, allowed {bound[at].item():.3g} ({int(bad.sum())} of "
                f"{a.numel()} elements)"
            )


def check(
    case: Case,
    tensors: Tensors,
    options: Options,
    generator: Generator,
    incoming: Tensor | None = None,
    roundings: int = 8,
) -> None:
    """The value and all gradients against the formula in float64."""
    wanted = case.loss.differentiable
    actual = run(case.function, tensors, options, wanted, incoming)
    expected = reference(case, tensors, options, wanted, incoming, generator)
    assert_exact(actual, expected, roundings)
