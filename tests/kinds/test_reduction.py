"""A definition of a loss of rows alone makes a formula, kernels and a reference with 50 digits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import elsewhere
import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent))

from overlap import OVERLAP

from fusedloss.engines.cpu import reductions
from fusedloss.engines.cpu.printer import CannotPrint
from fusedloss.kinds.reduction import ReductionCall

SOURCE = (Path(__file__).parent / "overlap.py").read_text()
# Of both ways to run it, in the types that there are; {first} says where the kernels run.
CHECK = """
import sys, torch
{first}
import fusedloss
from fusedloss.route import dispatch as route
from fusedloss.kinds.reduction import ReductionCall
from torch.testing import assert_close
generator = torch.Generator().manual_seed(0)
for shape in ((4, 7), (3, 2, 5), (6,), (2, 300), (0, 3), (33, 130)):
    for dtype in (torch.float32, torch.float64, torch.float16):
        x, t = torch.randn(2, *shape, generator=generator).to(dtype)
        y = torch.randn(shape[:-1], generator=generator).to(dtype)
        for reduction in ("none", "mean"):
            call = ReductionCall("overlap", (0.5,), reduction, dtype)
            found = []
            for run in (lambda *given: route.dispatch("overlap_loss", call, given), call.by_formula):
                given = x.clone().requires_grad_(), t.clone().requires_grad_()
                value = run(*given, y)
                found.append((value, *torch.autograd.grad(value, given, torch.ones_like(value))))
            if x.numel():
                route_taken = fusedloss.explain(lambda: route.dispatch("overlap_loss", call, (x, t, y)))
                assert route_taken.kernel == "overlap", route_taken
            assert_close(*found, equal_nan=True)
print("same")
"""


def score(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    dice = (2 * (x * t).sum(-1) + 0.5) / ((x * x).sum(-1) + (t * t).sum(-1) + 0.5)
    return torch.where(y > 0, 1 - dice, dice.clamp(min=0))


def drawn(generator: Generator, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    x, t = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), t.requires_grad_(), torch.randn(shape[:-1], generator=generator)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_formula(reduction: str, generator: Generator) -> None:
    x, t, y = drawn(generator, 6, 5)
    call = ReductionCall("overlap", (0.5,), reduction, torch.float64)
    expected = score(x, t, y)
    if reduction != "none":
        expected = getattr(expected, reduction)()
    found = call.by_formula(x, t, y)
    assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), (x, t)),
        torch.autograd.grad(expected.sum(), (x, t)),
        strict=True,
    ):
        assert_close(ours, theirs)
    assert call.shape(x, t, y) == (6,)
    assert call.arguments == ("x", "t", "y")


def test_reference(generator: Generator) -> None:
    exact = pytest.importorskip("fusedloss.cli.verify.exact")
    x, t, y = drawn(generator, 4, 5)
    call = ReductionCall("overlap", (0.5,), "none", torch.float64)
    value = call.by_formula(x, t, y)
    expected = (value, *torch.autograd.grad(value.sum(), (x, t)))
    found = exact.reference(call, (x.detach(), t.detach(), y))
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.high, theirs.detach(), rtol=1e-14, atol=1e-15)
        assert torch.equal(ours.unit > 0, theirs != 0)


def checked(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.nightly
def test_kernel(tmp_path: Path) -> None:
    """Of a copy that has the definition among its losses, built with it."""
    root = elsewhere.copy(tmp_path / "copy")
    losses = root / "src/fusedloss/losses"
    shutil.copy(Path(__file__).parent / "overlap.py", losses)
    elsewhere.build(root)
    first = f"""
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, {str(root / "src")!r})
import fusedloss.losses.overlap"""
    checked([sys.executable, "-c", CHECK.format(first=first)])


@pytest.mark.slow
def test_kernel_of_triton() -> None:
    pytest.importorskip("triton")
    first = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import overlap
from fusedloss import engines
interpreted = engines.interpreted()
interpreted.__enter__()"""
    checked([sys.executable, "-c", CHECK.format(first=first)], TRITON_INTERPRET="1")


def test_prints_it() -> None:
    text = reductions.header({"overlap.py": SOURCE})
    assert "operands = 2, measures = 3;" in text
    assert "inline void map(T x, T t, T& term0, T& term1, T& term2) const {" in text
    assert "inline T value(T dot, T xx, T tt, T y) const {" in text
    assert text.rstrip().endswith("#define FUSEDLOSS_REDUCTIONS(X) X(overlap)")


REFUSED = {
    "return x * t, x * x, t * t": ("return x * t, x * x", "products returns 2 values, not 3"),
    "dot, xx, tt, y, *": ("dot, xx, *", "overlap takes 2 operands, not 3 and maybe a label"),
    "return 2.0 * side, -side * score, -side * score": (
        "return 2.0 * side, -side * score",
        "overlap_grad returns 2 values, not 3",
    ),
    "def products_slope(x, t,": ("def products_slope(x, y,", "takes other operands or numbers"),
    "x * t, x * x, t * t": ("x * t, x ** 2, t * t", r"cannot print `x \*\* 2`"),
    "Sums(products, products_slope)": (
        "Sum(products)",
        r"`Sum\(products\)` is no Sums or Distances",
    ),
    "Pointwise(overlap, overlap_grad)": ("overlap", "`overlap` is no Pointwise"),
    "*, smooth": ("*, smooth, a, b, c, d", "has 5 numbers, more than 4"),
}


@pytest.mark.parametrize("old", REFUSED)
def test_names_what_it_cannot_print(old: str) -> None:
    new, message = REFUSED[old]
    assert old in SOURCE
    with pytest.raises(CannotPrint, match=rf"^overlap\.py:\d+: .*{message}"):
        reductions.header({"overlap.py": SOURCE.replace(old, new)})


def test_knows_its_definitions() -> None:
    assert OVERLAP.label == "y" and OVERLAP.params == ("smooth",)
    assert OVERLAP.measure.count == 3
