"""What holds of the GPU kernels beside what tests/losses asks of every kernel.

test_gpu.py runs this file in processes of their own: interpreted on CPU tensors, and on a GPU if there
is one.
"""

from __future__ import annotations

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
from fusedloss.cli.bench import cuda as bench
from fusedloss.engines import gpu
from fusedloss.engines.gpu import (
    cross_entropy,
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

SHAPES = {
    "pointwise": (3, 7, 5),
    "rows": (3, 7, 5),
    "triplet": (6, 11),
    "sequences": (3, 7, 5),
    "pair": (6, 11),
    "multilabel": (6, 11),
    "margins": (6, 11),
}
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


@parameters(
    lambda case: case.kind in ("triplet", "pair", "multilabel") and "lambda" not in case.option
)
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


# Strides


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
