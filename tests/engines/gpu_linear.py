"""The Triton row step of linear losses against the formula in float64; test_gpu.py runs this file too."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE, GPU, formula_path, name_of, same_bits
from problems import REDUCTIONS, SETTINGS, Problem
from torch import Generator, Tensor

import fusedloss
from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob
from fusedloss.engines import gpu
from fusedloss.engines.chunks import chunked as chunks
from fusedloss.engines.gpu import linear, tiles
from fusedloss.kinds.heads import LinearCall, Rows

assert GPU, "test_gpu.py runs this file"

CALL = LinearCall(
    "linear_cross_entropy",
    False,
    "none",
    -100,
    *(0.0, 0.0, 0.0, 1.0),
    *(False, 0, 0, False),
    torch.float32,
)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    fusedloss.synchronize()


@pytest.fixture(params=[64, 16], ids=["whole", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows that a program holds, and rows longer than its block."""
    each = tiles.Tile(8, request.param, request.param == 64, 4)
    monkeypatch.setattr(linear, "tile", lambda *_: each)
    return int(request.param)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step took."""
    seen: list[int] = []
    original = linear.step

    def step(*args: Any) -> None:
        seen.append(args[1].shape[0])
        original(*args)

    monkeypatch.setattr(linear, "step", step)
    return seen


def on_device(problem: Problem, settings: dict[str, Any]) -> dict[str, Any]:
    problem.tensors = {k: t.to(DEVICE) for k, t in problem.tensors.items()}
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in settings.items()}


@pytest.mark.parametrize(
    ("setting", "reduction"), list(zip(SETTINGS, itertools.cycle(REDUCTIONS), strict=False))
)
def test_loop_is_the_formula(
    setting: str, reduction: str, block: int, generator: Generator, steps: list[int]
) -> None:
    problem = Problem(generator, out=(2,) if setting == "all" else (), shape=(11, 5, 53))
    settings = {**on_device(problem, problem.settings(setting)), "reduction": reduction}
    with formula_path():
        expected = problem.run(linear_cross_entropy, **settings)
    found = problem.run(linear_cross_entropy, **settings, memory_budget=5000)
    torch.testing.assert_close(found, expected)
    assert len(steps) > 1


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "softcap": 3.0}], ids=str)
def test_statistics(
    settings: dict[str, Any], block: int, generator: Generator, steps: list[int]
) -> None:
    problem = Problem(generator, shape=(11, 5, 53))
    on_device(problem, {})
    with formula_path():
        expected = problem.run(linear_log_prob, **settings, statistics=True)
    found = problem.run(linear_log_prob, **settings, statistics=True, memory_budget=5000)
    torch.testing.assert_close(found, expected)
    assert steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 3.0, "z_loss": 0.01, "smoothing": 0.1}], ids=str
)
def test_step_of_a_chunk(
    settings: dict[str, float], dtype: torch.dtype, block: int, generator: Generator
) -> None:
    """Within a few roundings of float32 from the formula, and the gradient's own to its type."""
    call = dataclasses.replace(CALL, **settings)
    x = (3 * torch.randn(9, 53, generator=generator)).to(dtype).to(DEVICE)
    y = torch.randint(53, (9, 1), generator=generator).to(DEVICE)
    y[4] = -100
    weight = (torch.rand(53, generator=generator) + 0.5).to(DEVICE)
    incoming = torch.randn(9, generator=generator).to(DEVICE)
    wide = x.double().unsqueeze(2).requires_grad_()
    exact = call.rows(wide, y, weight.double()).loss
    (slope,) = torch.autograd.grad(exact.squeeze(1), wide, incoming.double())
    x[4, 3] = torch.inf  # of an ignored row
    found = Rows(torch.full((9,), torch.nan, device=DEVICE))
    linear.step(call, x, y[:, 0], weight, found, Rows(incoming), 0, y.shape)
    torch.testing.assert_close(found.loss.double(), exact.squeeze(1).detach(), rtol=1e-6, atol=1e-6)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(x.double(), slope.squeeze(2), rtol=rounding + 2e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32], ids=name_of)
def test_labels_of_every_integer_type(dtype: torch.dtype, generator: Generator) -> None:
    x, w = (torch.randn(n, 3, generator=generator).to(DEVICE) for n in (6, 256))
    target = torch.tensor([0, 3, 100, 127, 156, 255], device=DEVICE)
    for ignored in (-1, -100, 255, 300):
        found, expected = (
            [
                linear_cross_entropy(x, w, labels, ignore_index=ignored),
                *linear_log_prob(x, w, labels, ignore_index=ignored, statistics=True),
            ]
            for labels in (target.to(dtype), target)
        )
        assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("kind", ["count", "weight", "sample_weight", "float16", "int64"])
def test_mean_is_sum_over_a_float64_divisor(kind: str, generator: Generator) -> None:
    problem = Problem(generator, shape=(11, 5, 53))
    settings: dict[str, Any] = {
        "weight": {"weight": problem.normal(53).abs()},
        "sample_weight": {"sample_weight": problem.rewards().bfloat16()},
        "float16": {"denominator": torch.tensor(7.3, dtype=torch.float16)},
        "int64": {"denominator": torch.tensor(7)},
    }.get(kind, {})
    settings = on_device(problem, settings)
    mean = problem.run(linear_cross_entropy, **settings)
    n: Any = settings.pop("denominator", None)
    total = problem.run(linear_cross_entropy, **settings, reduction="sum")
    if n is None:
        target = problem.tensors["target"]
        weight = settings.get("weight", torch.ones(53, dtype=torch.float64, device=DEVICE))
        n = weight[target[target != -100]].sum()
    for a, b in zip(mean, total, strict=True):
        exact = b / n.double()
        assert (a - exact).abs().max() <= 1e-14 * exact.abs().max()


@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0**7}, {"z_loss": 0.25}], ids=str)
def test_digits_near_certainty(settings: dict[str, float], block: int) -> None:
    call = dataclasses.replace(CALL, **settings)
    x = torch.arange(80.0).reshape(2, 40).remainder(13) / 64
    y = torch.tensor([[0], [39]])
    x.scatter_add_(1, y, torch.full((2, 1), 30.0))
    wide = x.double().unsqueeze(2).requires_grad_()
    exact = call.rows(wide, y, None).loss
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    x, found = x.to(DEVICE), Rows(torch.zeros(2, device=DEVICE))
    incoming = Rows(torch.ones(2, device=DEVICE))
    linear.step(call, x, y[:, 0].to(DEVICE), None, found, incoming, 0, y.shape)
    few = (4 if not call.softcap else 256) * 2**-23  # a cap rounds the logits
    torch.testing.assert_close(
        found.loss.cpu().double(), exact.squeeze(1).detach(), rtol=few, atol=0
    )
    torch.testing.assert_close(x.cpu().double(), slope.squeeze(2), rtol=few, atol=0)


def test_the_place_of_a_bad_label(block: int, generator: Generator) -> None:
    """The second head of rows 8 to 11 of 20; its row is NaN with the gradient 0, the others as ever."""
    target = torch.zeros(20, 2, dtype=torch.int64, device=DEVICE)
    target[10, 1] = 53
    x = torch.randn(4, 53, generator=generator).to(DEVICE)
    others = torch.tensor([0, 1, 3], device=DEVICE)
    expected, loss = x.clone(), torch.zeros(4, device=DEVICE)
    ones = Rows(torch.ones(4, device=DEVICE))
    linear.step(CALL, expected, target[:4, 1], None, Rows(loss.clone()), ones, 1, target.shape)
    linear.step(CALL, x, target[8:12, 1], None, Rows(loss), ones, 17, target.shape)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert loss.isnan().tolist() == [False, False, True, False]
    assert x[2].eq(0).all() and same_bits(x[others], expected[others])
    words = r"linear_cross_entropy: target\[10, 1\] = 53 is out of range for 53 classes"
    with pytest.raises(IndexError, match=words):
        fusedloss.synchronize()


def test_torch_operations_serve_where_triton_fails(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(generator, shape=(5, 3, 20))
    on_device(problem, {})
    expected = problem.run(linear_cross_entropy)
    monkeypatch.setattr(gpu.available, "failures", {})

    def fail(*_: Any) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(gpu.family("launch"), "run", fail)
    with pytest.warns(UserWarning, match="Triton failed: OSError: no compiler"):
        found = problem.run(linear_cross_entropy)
    torch.testing.assert_close(found, expected)
    assert not chunks.takes_triton(CALL, problem.tensors["input"])


def test_the_route(generator: Generator) -> None:
    problem = Problem(generator, shape=(5, 3, 20))
    on_device(problem, {})
    route = fusedloss.explain(linear_cross_entropy, **problem.tensors)
    assert (route.kernel, route.device) == ("linear", "GPU")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["indices", "probabilities", "distilled"])
def test_compiled_whole(kind: str, reduction: str, generator: Generator) -> None:
    """The steps by torch operations differentiate within the operator, too."""
    problem = Problem(generator, probabilities=kind == "probabilities", shape=(5, 3, 20))
    on_device(problem, {})
    function: Callable[..., Tensor] = linear_cross_entropy
    settings: dict[str, Any] = {"reduction": reduction}
    if kind == "distilled":
        function, problem.learned = linear_kl_div, ["input", "linear_weight", "linear_bias"]
        settings["teacher_logits"] = problem.normal(5, 20).to(DEVICE)
        del problem.tensors["target"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with formula_path():
        expected = problem.run(function, **settings)
    torch.testing.assert_close(problem.run(compiled, **settings), expected)
