"""What holds of the GPU kernels beside what test_losses.py asks of every kernel.

test_gpu.py runs this file in processes of their own: interpreted on CPU tensors, and on a GPU if there
is one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from conftest import (
    CASES,
    DEVICE,
    FLOATS,
    GPU,
    Case,
    assert_same_bits,
    check,
    draw_incoming,
    formula_path,
    name_of,
    no_head,
    parameters,
    run,
    same_bits,
)
from torch import Generator, Tensor, tensor

import fusedloss
from fusedloss import functional
from fusedloss.autograd import operators
from fusedloss.cli import info
from fusedloss.cli.bench import cuda as bench
from fusedloss.engines import gpu
from fusedloss.engines.gpu import (
    cross_entropy,
    flags,
    launch,
    m,
    nll,
    pointwise,
    reduction,
    tiles,
)
from fusedloss.kinds.reduction import ReductionCall
from fusedloss.kinds.rows import RowsCall

assert GPU, "test_gpu.py runs this file"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    fusedloss.synchronize()


# Every option, reduction and type

SHAPES = {"pointwise": (3, 7, 5), "rows": (3, 7, 5), "triplet": (6, 11)}
TABLE = [
    (case, reduction, FLOATS[k % 4])
    for k, (case, reduction) in enumerate(
        (c, r) for c in CASES if no_head(c) for r in c.loss.reductions
    )
]


@pytest.mark.parametrize(
    ("case", "reduction", "dtype"), TABLE, ids=[f"{c}-{r}-{name_of(d)}" for c, r, d in TABLE]
)
def test_option(case: Case, reduction: str, dtype: torch.dtype, generator: Generator) -> None:
    tensors, options = case.example(SHAPES[case.kind], dtype, generator)
    options["reduction"] = reduction
    with formula_path():
        value = case.loss.function(*tensors, **options)
    if reduction == "none":
        route = fusedloss.explain(case.loss.function, *tensors, **options)
        assert route.device == "GPU", str(route)
    check(case, tensors, options, generator, draw_incoming(value, generator))


# More than one block, program or dimension


@pytest.mark.parametrize("size", [1, 17, 64, 300])
@parameters(lambda case: case.kind == "pointwise" and case.option == "plain")
def test_programs_of_pointwise(
    case: Case, size: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BLOCK", 16), ("ONE_PROGRAM", 64), ("MOST_PROGRAMS", 3)):
        monkeypatch.setattr(pointwise, name, value)
    tensors, options = case.example((size,), torch.float32, generator)
    for options["reduction"] in ("mean", "none"):
        check(case, tensors, options, generator)


@pytest.mark.parametrize("shape", [(3, 33), (2, 33, 5)], ids=str)
@parameters(lambda case: case.kind == "rows" and case.option in ("plain", "all", "both"))
def test_rows_longer_than_a_block(
    case: Case, shape: tuple[int, ...], generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "tile", lambda *_: tiles.Tile(2, 16, shape[1] <= 16, 4))
    monkeypatch.setattr(nll, "POSITIONS", 4)
    tensors, options = case.example(shape, torch.float32, generator)
    options["reduction"] = "mean"
    check(case, tensors, options, generator)


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter of Triton 3.6
@pytest.mark.parametrize("held", [1, 2])
@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities", "one-hot"])
def test_infinite_and_nan_logits_of_long_rows(
    kind: str, held: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, beside the own class, more than one, in the first block and the last, and nothing else."""
    inf = math.inf
    changes: list[dict[int, float]] = [
        {}, {3: inf}, {3: -inf}, {3: math.nan}, {3: inf, 20: inf}, {39: 100.0}, {0: 100.0, 39: 100.0},
        {5: 100.0, 6: 100.0}, {20: math.nan}, dict.fromkeys(range(40), -inf),
        {**dict.fromkeys(range(40), -inf), 7: 1.0}, dict.fromkeys(range(40), 0.0),
    ]  # fmt: skip
    x = torch.randn(1, 40, generator=generator).repeat(len(changes), 1)
    for row, change in zip(x, changes, strict=True):
        for at, value in change.items():
            row[at] = value
    y = torch.full((len(x),), 3)
    q = torch.rand(x.shape, generator=generator) if kind == "probabilities" else None
    q = torch.nn.functional.one_hot(y, 40).float() if kind == "one-hot" else q
    options: dict[str, Any] = {"label_smoothing": 0.1} if kind == "smoothed" else {}
    options["reduction"] = "none"
    found = []
    for each in (tiles.Tile(held, 64, True, 4), tiles.Tile(held, 16, False, 4)):
        monkeypatch.setattr(cross_entropy, "tile", lambda *_, each=each: each)
        leaf = x.to(DEVICE).requires_grad_()
        losses = functional.cross_entropy(leaf, (y if q is None else q).to(DEVICE), **options)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        found.append((losses.detach(), grad))
    expected = torch.nn.functional.cross_entropy(
        x.double(), y if q is None else q.double(), **options
    )
    for whole, blocks in zip(*found, strict=True):
        torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-5, equal_nan=True)
    finite = expected.isfinite()
    torch.testing.assert_close(
        found[1][0].cpu().double()[finite], expected[finite], rtol=1e-6, atol=1e-6
    )


@parameters(lambda case: case.kind == "triplet" and "lambda" not in case.option)
def test_features_more_than_a_block(
    case: Case, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduction, "WIDEST", 16)
    tensors, options = case.example((131, 37), torch.float32, generator)
    options["reduction"] = "mean"
    check(case, tensors, options, generator)


def test_gradients_stay_where_the_formula_has_them_at_extremes(generator: Generator) -> None:
    """Near certainty, a masked class, equal logits, and logits far apart."""
    inf = math.inf
    x = tensor([[40.0, 0, 0], [0, -inf, 0], [5, 5, 5], [-1e4, 1e4, 0], [1e-3, 0, -1e-3]])
    x, y = x.to(DEVICE).requires_grad_(), tensor([0, 2, 1, 1, 0], device=DEVICE)
    losses = functional.cross_entropy(x, y, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x)
    wide = x.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, y, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(losses[0].item(), 2 * math.exp(-40), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-17)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-17)
    torch.testing.assert_close(grad[0, 0].item(), -2 * math.exp(-40), rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [64, 16])
@pytest.mark.parametrize("target", ["indices", "smoothed", "one-hot", "nearly", "tied"])
def test_digits_near_certainty(
    target: str, block: int, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logit 30 above the others, at the start, within a later block and at the end."""
    monkeypatch.setattr(cross_entropy, "tile", lambda *_: tiles.Tile(2, block, block == 64, 4))
    y = tensor([0, 20, 39])
    x = torch.randint(1024, (3, 40), generator=generator) / 1024  # differences are exact
    x[torch.arange(3), y] += 30
    if target == "tied":
        x[:, 7] = x[torch.arange(3), y]
    options = {"label_smoothing": 0.1} if target == "smoothed" else {}
    q = torch.nn.functional.one_hot(y, 40).float()
    q = q.lerp(torch.full_like(q, 1 / 40), 1e-9) if target == "nearly" else q
    given = y if target in ("indices", "smoothed") else q

    def both(x: Tensor, q: Tensor) -> list[Tensor]:
        moving = [t.to(DEVICE).requires_grad_() for t in (x, q) if t.is_floating_point()]
        losses = functional.cross_entropy(
            moving[0], [*moving, q.to(DEVICE)][1], **options, reduction="none"
        )
        return [losses.detach(), *torch.autograd.grad(losses.sum(), moving)]

    found = both(x, given)
    with formula_path():
        expected = both(x.double(), given if given is y else given.double())
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=4 * 2**-23, atol=0)


def test_whether_triton_is_there_is_a_constant_for_the_compiler() -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1 if gpu.problem() is None else x

    x = torch.zeros(3)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), x + 1)


# Repeated


@parameters(lambda case: no_head(case) and case.option == next(iter(case.loss.options)))
def test_the_same_bits_again(case: Case, generator: Generator) -> None:
    tensors, options = case.example((70, 21), torch.float32, generator)
    first = run(case.loss.function, tensors, options, case.loss.differentiable)
    for _ in range(1 if GPU == "interpreted" else 5):
        again = run(case.loss.function, tensors, options, case.loss.differentiable)
        assert_same_bits(again, first)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@parameters(lambda case: no_head(case) and case.option == next(iter(case.loss.options)))
def test_a_kept_graph_gives_the_same_bits(case: Case, factor: float, generator: Generator) -> None:
    tensors, options = case.example((9, 21), torch.bfloat16, generator)
    inputs = tuple(
        t.detach().requires_grad_(k in case.loss.differentiable) for k, t in enumerate(tensors)
    )
    moving = [t for t in inputs if t.requires_grad]
    value = case.loss.function(*inputs, **options)
    incoming = torch.full_like(value, factor)
    first = torch.autograd.grad(value, moving, incoming, retain_graph=True)
    kept = [g.clone() for g in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(value, moving, incoming)
    assert all(map(same_bits, second, kept))


# Errors, told without a sync

BAD = r"cross_entropy: target\[2, 1\] = 7 is out of range for 4 classes \(ignore_index = -100\)"


def bad_labels() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 4, 5, generator=Generator().manual_seed(0)).to(DEVICE)
    y = torch.zeros(3, 5, dtype=torch.int64, device=DEVICE)
    y[2, 1] = 7
    return x, y


def settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def test_a_bad_label_makes_its_row_nan_and_is_raised_once(generator: Generator) -> None:
    x, y = bad_labels()
    losses = functional.cross_entropy(x, y, reduction="none")
    settle()
    assert losses.isnan().nonzero().tolist() == [[2, 1]]
    with pytest.raises(IndexError, match=BAD):
        fusedloss.synchronize()
    fusedloss.synchronize()
    y[2, 1] = 3
    expected = torch.nn.functional.cross_entropy(x, y)
    torch.testing.assert_close(functional.cross_entropy(x, y), expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("value", [4, -1, 2**40, -(2**40)])
def test_a_bad_label_in_every_form(function: str, reduction: str, value: int) -> None:
    x, y = bad_labels()
    y[2, 1] = value
    loss = getattr(functional, function)(x, y, reduction=reduction)
    settle()
    assert loss.isnan().any()
    with pytest.raises(IndexError, match=rf"{function}: target\[2, 1\] = {value} is out of range"):
        fusedloss.synchronize()


def test_the_next_call_raises_whatever_it_is() -> None:
    functional.cross_entropy(*bad_labels())
    settle()
    a = torch.zeros(3, device=DEVICE)
    with pytest.raises(IndexError, match=BAD):
        functional.mse_loss(a, a)
    assert functional.mse_loss(a, a).item() == 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_raises(reduction: str) -> None:
    x, y = bad_labels()
    loss = functional.cross_entropy(x.requires_grad_(), y, reduction=reduction)
    settle()
    with pytest.raises(IndexError, match=BAD):
        loss.sum().backward()


def test_a_bad_label_leaves_the_other_gradients() -> None:
    """What a step takes that runs before the error is known."""
    x, y = bad_labels()
    call = RowsCall("cross_entropy", False, "sum", -100, 0.0, torch.float32)
    _, (expected, *_) = gpu.engine_of("rows").forward(
        call, (x, y.clamp(max=3), None), (True, False, False)
    )
    _, (grad, *_) = gpu.engine_of("rows").forward(call, (x, y, None), (True, False, False))
    assert grad is not None and expected is not None
    rest = torch.ones_like(y, dtype=torch.bool)
    rest[2, 1] = False
    assert same_bits(grad.movedim(1, 2)[rest], expected.movedim(1, 2)[rest])
    assert grad[2, :, 1].eq(0).all()
    with pytest.raises(IndexError):
        fusedloss.synchronize()


def test_checks_eager_raises_at_the_call() -> None:
    with fusedloss.checks("eager"), pytest.raises(IndexError, match=BAD):
        functional.cross_entropy(*bad_labels())


def test_the_first_of_many_programs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nll, "POSITIONS", 4)
    x = torch.zeros(40, 3, device=DEVICE)
    functional.nll_loss(x, torch.full((40,), 3, device=DEVICE))
    with pytest.raises(IndexError, match=r"target\[\d+\] = 3 is out of range for 3 classes"):
        fusedloss.synchronize()
    fusedloss.synchronize()


@pytest.mark.parametrize("sign", ["", "u"])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_class_indices_of_any_integer_type(function: str, bits: int, sign: str) -> None:
    dtype = getattr(torch, f"{sign}int{bits}")
    x = torch.randn(6, 4, generator=Generator().manual_seed(1)).to(DEVICE)
    y = tensor([0, 3, 2, 1, 3, 0], device=DEVICE)
    found = getattr(functional, function)(x, y.to(dtype), ignore_index=3)
    expected = getattr(torch.nn.functional, function)(x, y, ignore_index=3)
    torch.testing.assert_close(found, expected)
    getattr(functional, function)(x, torch.full((6,), 100, device=DEVICE).to(dtype))
    with pytest.raises(IndexError, match=r"target\[0\] = 100 is out of range"):
        fusedloss.synchronize()


OUTSIDE = [
    (0, (1, 2), 1.5, r"input should be between 0 and 1, but input\[1, 2\] = 1\.5.*with_logits"),
    (0, (0, 0), math.nan, r"input should be between 0 and 1, but input\[0, 0\] = nan"),
    (1, (2, 3), -0.25, r"target should be between 0 and 1, but target\[2, 3\] = -0\.25"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(("argument", "at", "value", "words"), OUTSIDE)
def test_a_probability_outside(
    argument: int, at: tuple[int, int], value: float, words: str, dtype: torch.dtype
) -> None:
    tensors = [torch.full((3, 4), 0.5, dtype=dtype, device=DEVICE) for _ in range(2)]
    tensors[argument][at] = value
    losses = functional.binary_cross_entropy(*tensors, reduction="none")
    settle()
    assert losses.isnan().nonzero().tolist() == [list(at)]
    with pytest.raises(RuntimeError, match=f"binary_cross_entropy: all elements of {words}"):
        fusedloss.synchronize()


def test_records_are_shared() -> None:
    x, y = bad_labels()
    y.zero_()
    functional.cross_entropy(x, y)
    before = len(flags._by_number)
    for _ in range(3):
        functional.cross_entropy(x, y)
    assert len(flags._by_number) == before


# Where Triton fails


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    def fail(*_: Any) -> None:
        raise OSError("no compiler")

    yield lambda: monkeypatch.setattr(launch, "run", fail)
    gpu.available.failures.clear()


@pytest.mark.parametrize("function", ["mse_loss", "cross_entropy"])
def test_the_formula_runs_where_triton_fails(function: str, failing: Callable[[], None]) -> None:
    case = next(c for c in CASES if c.loss.name == function)
    tensors, options = case.example((5, 4), torch.float32, Generator().manual_seed(0))
    expected = run(case.loss.torch_function, tensors, options, (0,))
    failing()
    with pytest.warns(
        UserWarning, match="Triton failed: OSError: no compiler.*the formula"
    ) as told:
        found = run(case.loss.function, tensors, options, (0,))
    assert len(told) == 1
    again = run(case.loss.function, tensors, options, (0,))
    for outcome in (found, again):
        for (_, a), (_, e) in zip(outcome.named(), expected.named(), strict=True):
            torch.testing.assert_close(a, e)
    route = fusedloss.explain(case.loss.function, *tensors, **options)
    assert route.kernel is None and "no compiler" in route.why
    assert gpu.problem("reduction") is None
    assert info.facts()["GPU kernels"].startswith("off: Triton failed: OSError")


def test_the_formula_differentiates_where_triton_fails_in_backward(
    failing: Callable[[], None],
) -> None:
    x = torch.randn(5, 4, generator=Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    y = torch.zeros(5, 4, device=DEVICE)
    losses = functional.mse_loss(x, y, reduction="none")
    failing()
    with pytest.warns(UserWarning, match="Triton failed"):
        losses.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("within", ["forward", "backward"])
@pytest.mark.parametrize("function", ["cross_entropy", "triplet_margin_loss"])
def test_the_formula_runs_in_a_compiled_graph_where_triton_fails(
    function: str, within: str, failing: Callable[[], None]
) -> None:
    case = next(c for c in CASES if c.loss.name == function)
    tensors, _ = case.example((5, 4), torch.float32, Generator().manual_seed(0))
    x, *rest = tensors
    reduction = "mean" if within == "forward" else "none"  # a mean's backward runs no kernel
    ours, theirs = (
        functools.partial(f, reduction=reduction)
        for f in (case.loss.function, case.loss.torch_function)
    )
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")

    def both(function: Callable[..., Tensor], fails: bool = False) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone().requires_grad_()
        value = function(leaf, *rest)
        if fails:
            failing()
        return value.detach(), torch.autograd.grad(value, leaf, torch.ones_like(value))[0]

    expected = both(theirs)
    torch.testing.assert_close(both(compiled), expected)
    if within == "forward":
        failing()
    with pytest.warns(UserWarning, match="Triton failed") as told:
        found = both(compiled, within == "backward")
    assert len(told) == 1
    for outcome in (found, both(compiled)):
        torch.testing.assert_close(outcome, expected)


def test_gradients_have_the_strides_that_fakes_promise(generator: Generator) -> None:
    """A compiled graph, whose operators are known by their fakes, relies on them."""
    x, q = torch.rand(2, 2, 5, 3, 2, generator=generator).to(DEVICE)
    y = torch.zeros(2, 3, 2, dtype=torch.int64, device=DEVICE)
    last = ("none", -100, 0.0, torch.float32)
    found: list[tuple[Any, tuple[Tensor | None, ...]]] = [
        (RowsCall("cross_entropy", False, *last), (x, y, None)),
        (RowsCall("nll_loss", False, *last), (x, y, None)),
        (RowsCall("cross_entropy", True, *last), (x, q, None)),
        (ReductionCall("triplet", (2.0, 1e-6, 1.0), "none", torch.float32), (x, q, q + 1)),
    ]
    for call, (_, *rest) in found:
        for given in (
            x,
            x.to(memory_format=torch.channels_last),
            x.transpose(0, 3).contiguous().transpose(0, 3),
            x[:1].expand(x.shape),
        ):
            floats = [t is not None and t.is_floating_point() for t in rest]
            needed = [True, *floats]
            incoming = [torch.ones_like(t) for t in operators.run(call, (given, *rest))]
            arguments = ([True], needed, given, *rest, *operators.settings(call))
            grads = operators.operator(f"{call.family}_backward")(incoming, *arguments)
            wanted = [t for t, need in zip((given, *rest), needed, strict=True) if need]
            for grad, like in zip(grads, map(call.empty_gradient, wanted), strict=True):
                assert grad.stride() == like.stride()


# The functions of the namespace

NEAR_ONE = [1 + k * 2.0**-20 for k in (-9, -1, 0, 1, 9)]
TINY = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-8, 6e-8, 1e-4]
DOMAINS = {
    "exp": [-110.0, -104.0, -88.0, -20.5, -1.0, *TINY, 0.3, 1.0, 10.0, 88.7, 90.0, math.inf],
    "exp_softmax": [-math.inf, -87.3, -30.1, -20.5, -1.0, *(-t for t in TINY)],
    "exp_raised": [-math.inf, -120.0, -104.0, -87.4, -30.1, -20.5, -1.0, *(-t for t in TINY)],
    "tanh": [-math.inf, -20.0, -0.63, -0.62, *TINY, *(-t for t in TINY), 0.3, 1.0, 9.0, math.inf],
    "log": [*TINY, *NEAR_ONE, 0.5, 0.75, 1.5, 3.0, 1e10, 3e38, math.inf, -1.0],
    "log_or_zero": [*TINY, *NEAR_ONE, 7.0],
    "log1p": [
        -1.0,
        -0.999,
        -0.5,
        -0.25,
        *TINY,
        *(-t for t in TINY),
        *NEAR_ONE,
        1e5,
        3e38,
        math.inf,
    ],
    "sigmoid": [-math.inf, -100.0, -50.0, -2.0, *TINY, 2.0, 20.0, 100.0, math.inf],
    "log_sigmoid": [-math.inf, -1e5, -50.0, -2.0, *TINY, 2.0, 20.0, 80.0, 100.0],
}
ULP = {
    "exp": 1,
    "exp_softmax": 2,
    "exp_raised": 2,
    "tanh": 2,
    "log": 1,
    "log_or_zero": 1,
    "log1p": 1,
    "sigmoid": 2,
    "log_sigmoid": 2,
}
EXACT: dict[str, Callable[[float], float]] = {
    "exp": lambda x: math.exp(x) if x < 700 else x,
    "exp_softmax": lambda x: math.exp(x),
    "exp_raised": lambda x: math.exp(x),
    "tanh": math.tanh,
    "log": lambda x: math.nan if x < 0 else math.log(x) if x else -math.inf,
    "log_or_zero": lambda x: math.log(x) if x else 0.0,
    "log1p": lambda x: math.log1p(x) if x > -1 else -math.inf,
    "sigmoid": lambda x: math.exp(min(x, 0)) / (1 + math.exp(-abs(x))),
    "log_sigmoid": lambda x: min(x, 0) - math.log1p(math.exp(-abs(x))),
}


@triton.jit
def _apply(x, y, n, F: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(y + lane, F(tl.load(x + lane, mask=lane < n, other=0.5)), mask=lane < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("name", DOMAINS)
def test_function_of_the_namespace(name: str, dtype: torch.dtype) -> None:
    """Within so many ULP of the exact result, subnormal results aside; NaN passes on."""
    draws = torch.rand(4000, generator=Generator().manual_seed(0), dtype=torch.float64)
    finite = [v for v in DOMAINS[name] if math.isfinite(v)]
    spread = min(finite) + draws * (min(max(finite), 100.0) - min(finite))
    x = torch.cat([tensor(DOMAINS[name], dtype=torch.float64), spread, draws]).to(dtype)
    y = torch.empty_like(x, device=DEVICE)
    _apply[(1,)](x.to(DEVICE), y, len(x), F=getattr(m, name), BLOCK=8192, enable_fp_fusion=True)
    if name == "exp_raised":
        y = y.double() * 2.0 ** (-64 if dtype is torch.float64 else -48)
    exact = tensor([EXACT[name](v) for v in x.tolist()], dtype=torch.float64)
    finite_result = exact.isfinite() & (exact.abs() <= torch.finfo(dtype).max)
    assert torch.equal(
        y.cpu().double()[~finite_result & ~exact.isnan()].abs(),
        exact[~finite_result & ~exact.isnan()].abs().clamp(min=math.inf),
    )
    assert y.cpu()[exact.isnan()].isnan().all()
    info = torch.finfo(dtype)
    ulp = (exact.abs() * info.eps).clamp_min(info.smallest_normal * info.eps)
    error = ((y.cpu().double() - exact).abs() / ulp)[finite_result]
    # An ULP is between eps / 2 and eps of its number; the reference is math's own in float64.
    allowed = ULP[name] + (1 if dtype is torch.float64 else 0)
    assert error.max() <= allowed, (
        f"{name}({x[finite_result][error.argmax()].item()!r}): {error.max():.2f}"
    )
    nan = torch.full((4,), math.nan, dtype=dtype, device=DEVICE)
    out = torch.empty_like(nan)
    _apply[(1,)](nan, out, 4, F=getattr(m, name), BLOCK=4, enable_fp_fusion=True)
    assert out.isnan().all()


# On a GPU alone

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
each_loss = parameters(lambda case: no_head(case) and case.option == next(iter(case.loss.options)))


@on_gpu
@pytest.mark.filterwarnings("ignore:.*ynchronization debug mode")
@each_loss
def test_no_call_waits_for_the_gpu(case: Case, generator: Generator) -> None:
    tensors, options = case.example((64, 33), torch.float32, generator)
    run(case.loss.function, tensors, options)
    inputs = tuple(
        t.detach().requires_grad_(k in case.loss.differentiable) for k, t in enumerate(tensors)
    )
    one = torch.ones((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.loss.function(*inputs, **options).backward(one)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # its leaves met another
@each_loss
def test_a_captured_graph_replays(case: Case, generator: Generator) -> None:
    tensors, options = case.example((64, 33), torch.float32, generator)
    inputs = tuple(
        t.detach().requires_grad_(k in case.loss.differentiable) for k, t in enumerate(tensors)
    )
    moving = [t for t in inputs if t.requires_grad]

    def step() -> tuple[Tensor, ...]:
        value = case.loss.function(*inputs, **options)
        return (value, *torch.autograd.grad(value, moving))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        moving[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(same_bits, captured, step()))


@on_gpu
@pytest.mark.filterwarnings("ignore")  # of Inductor's, about the precision of matrix products
@each_loss
def test_compiles_whole(case: Case, generator: Generator) -> None:
    tensors, options = case.example((64, 33), torch.float32, generator)
    function = torch.compile(case.loss.function, fullgraph=True)
    found = run(function, tensors, options, case.loss.differentiable)
    expected = run(case.loss.function, tensors, options, case.loss.differentiable)
    for (_, a), (_, e) in zip(found.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, e)


@on_gpu
@pytest.mark.parametrize("shape", [(70000, 32768), (3, 5, 2**28)], ids=str)
def test_rows_of_more_elements_than_31_bits_count(shape: tuple[int, ...]) -> None:
    enough_memory(5 * math.prod(shape))
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    y = torch.full(shape[:1] + shape[2:], shape[1] - 1, device=DEVICE)
    value = functional.cross_entropy(x, y, reduction="sum")
    (grad,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(y.numel() * math.log(shape[1]), rel=1e-2)
    last = grad[-1].reshape(shape[1], -1)[:, -1]
    torch.testing.assert_close(last[-1].item(), 1 / shape[1] - 1, rtol=1e-2, atol=0)


@on_gpu
@pytest.mark.parametrize("broadcast", [False, True])
def test_more_elements_than_31_bits_count(broadcast: bool) -> None:
    shape = (2**16 + 3, 2**15 + 1)
    enough_memory(8 * math.prod(shape))
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    row = torch.arange(shape[1], device=DEVICE).remainder(2).to(x.dtype)
    t = row.expand(shape) if broadcast else row.expand(shape).contiguous()
    value = functional.mse_loss(x, t, reduction="sum")
    (grad,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(shape[0] * (shape[1] // 2), rel=1e-2)
    assert same_bits(grad[-1], -2 * row) and same_bits(grad[0], -2 * row)


def enough_memory(size: int) -> None:
    if torch.cuda.mem_get_info()[0] < size:
        pytest.skip("not enough memory")


def test_positions_beyond_31_bits_are_64_bit_wide() -> None:
    """Where a small tensor is broadcast to a huge shape, its own strides are not what counts."""
    assert pointwise._index_type([2**16, 2**15], [(), (0, 1)]) is tl.int64
    assert pointwise._index_type([2**10, 2**10], [(2**22, 1)]) is tl.int64
    assert pointwise._index_type([2**10, 2**10], [(2**10, 1)]) is tl.int32
    assert pointwise._index_type([], [(), ()]) is tl.int32


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@each_loss
def test_autocast_gives_float32(case: Case, dtype: torch.dtype, generator: Generator) -> None:
    tensors, options = case.example((8, 5), dtype, generator)
    with torch.autocast("cuda", dtype):
        assert case.loss.function(*tensors, **options).dtype is torch.float32


@on_gpu
def test_mixed_devices_are_refused() -> None:
    x = torch.zeros(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="target is on cpu, input on cuda"):
        functional.mse_loss(x, torch.zeros(3))


# The benchmark


def test_every_step_of_the_benchmark() -> None:
    cases = tuple(c for c in bench.CASES if c.title in ("MSE 64M", "CE 8192x32000", "nll_loss 3x5"))
    kept: list[int] = []
    document = bench.benchmark(
        lambda d: kept.append(len(d["results"])), math.inf, dry=True, cases=cases
    )
    assert kept[:3] == [1, 2, 3] and not document["left_out"]
    for result in document["results"]:
        assert {"ours", "eager", "yardstick"} <= result["seconds"].keys(), result
        assert not result["wrong"]
