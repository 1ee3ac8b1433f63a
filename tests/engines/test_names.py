"""All that formulas are written with, by every backend: the values of a formula that has all of it."""

from __future__ import annotations

import ast
import ctypes
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import elsewhere
import every_name
import pytest
import torch
from every_name import DERIVATIVES, EVERYTHING, NUMBERS, calls, needed, operands
from test_capabilities import CAPABILITIES
from test_capabilities import flags as machine
from torch import Tensor

from fusedloss.cli.verify import exact
from fusedloss.engines import abi
from fusedloss.engines.cpu import engine, pointwise, printer
from fusedloss.kinds import names, torch_m
from fusedloss.kinds.formula import Pointwise

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14}
LIBRARIES = {
    **CAPABILITIES,
    "avx512_narrow": CAPABILITIES["avx512"],
}
SOURCE = """
#include "convert.cpp"
#include "formulas_every_name.cpp"
#include "pointwise.cpp"

FUSEDLOSS_EXPORT int64_t run(const fusedloss::PointwiseArgs* a) { return fusedloss::kernels::pointwise(*a); }
"""


def exactly(dtype: torch.dtype) -> list[Tensor]:
    """The losses and their four derivatives, from 50 digits."""
    spread = torch.broadcast_tensors(*operands(dtype))
    value, grad, _ = EVERYTHING.over(exact.m)
    numbers = dict(zip("abcd", NUMBERS, strict=True))
    if dtype is torch.float32:
        numbers = {k: torch.tensor(n).item() for k, n in numbers.items()}
    columns = zip(*(exact.numbers(t.flatten()) for t in spread), strict=True)
    rows = [(value(*p, **numbers), *grad(*p, **numbers)) for p in columns]
    shape = spread[0].shape
    return [
        torch.tensor([float(n) for n in column], dtype=torch.float64).reshape(shape)
        for column in zip(*rows, strict=True)
    ]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def wanted(request: pytest.FixtureRequest) -> tuple[torch.dtype, list[Tensor]]:
    return request.param, exactly(request.param)


def close(found: Tensor, want: Tensor) -> None:
    within = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), want, rtol=within, atol=within)


def check(
    call: Any, weight: Tensor | None, result: Tensor, grads: Any, wanted: list[Tensor]
) -> None:
    factor = 1.0 if weight is None else weight.double()
    losses = wanted[0] * factor
    parts = losses.numel() if call.reduction == "mean" else 1
    want = losses if call.reduction == "none" else losses.sum() / parts
    within = 10 * TOLERANCE[result.dtype]
    torch.testing.assert_close(result.double(), want, rtol=within, atol=within)
    for grad, slope in zip(grads, wanted[1:], strict=True):
        if grad is not None:
            close(grad, slope * factor / parts)


def test_the_formula_has_every_name_and_operator() -> None:
    tree = ast.parse(inspect.getsource(every_name))
    nodes = list(ast.walk(tree))
    called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {*names.FUNCTIONS, *names.CONSTANTS} <= called
    operators = {type(op) for node in nodes if isinstance(node, ast.Compare) for op in node.ops}
    operators |= {type(node.op) for node in nodes if isinstance(node, ast.BinOp | ast.UnaryOp)}
    assert {*names.ARITHMETIC, *names.COMPARISONS, *names.LOGIC, ast.USub} <= operators
    assert len(EVERYTHING.operands) == EVERYTHING.derivatives == names.OPERANDS
    assert len(EVERYTHING.params) == names.NUMBERS


def test_every_backend_takes_as_many_arguments() -> None:
    """Torch's own functions have no signature; mpmath's are of this library."""
    for name, known in names.FUNCTIONS.items():
        for m in (torch_m.NAMESPACES[torch.float64], exact.m):
            try:
                signature = inspect.signature(getattr(m, name))
            except ValueError:
                continue
            required = [p for p in signature.parameters.values() if p.default is p.empty]
            assert len(required) == known.arity, name


def test_the_headers_name_every_function() -> None:
    for header in ("math.h", "avx512.h"):
        text = (elsewhere.ROOT / "csrc" / header).read_text()
        for name in names.FUNCTIONS:
            if header == "avx512.h" and name in (
                "sigmoid",
                "log_sigmoid",
                "log_or_zero",
                "at_least",
            ):
                continue  # templates of math.h
            assert re.search(rf"INLINE \w+ {name}\(", text), f"{header} has no {name}"
    assert abi.FORMULA_OPERANDS == names.OPERANDS and abi.FORMULA_NUMBERS == names.NUMBERS


def test_torch(wanted: tuple[torch.dtype, list[Tensor]]) -> None:
    dtype, want = wanted
    for call, tensors in calls(dtype):
        leaves = [t.requires_grad_() for t in tensors[:4] if t is not None]
        result = call.by_formula(*leaves, tensors[4])
        spread = call.gradients_by_formula(tensors, needed((0, 1, 2, 3)), torch.ones_like(result))
        check(call, tensors[4], result.detach(), spread, want)
        grads = torch.autograd.grad(result, leaves, torch.ones_like(result))
        for grad, slope, leaf in zip(grads, spread, leaves, strict=True):
            assert slope is not None
            torch.testing.assert_close(grad, slope.sum_to_size(leaf.shape))


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every_name")
    printer.main(str(folder), every_name.__file__)
    (folder / "args.h").write_text(abi.header())
    (folder / "run.cpp").write_text(SOURCE)
    return folder


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request: pytest.FixtureRequest, headers: Path) -> Any:
    """Built for a capability, also where this machine cannot run it: then None."""
    name, to = request.param, headers / f"{request.param}.so"
    flags = elsewhere.flags(Path(f"libfusedloss_{name}.so"))
    folders = [f"-I{headers}", f"-I{elsewhere.ROOT / 'csrc'}"]
    shared = ["-O1", "-fPIC", "-shared", "-o", to, headers / "run.cpp"]
    subprocess.run([elsewhere.CXX, *flags, *folders, *shared], check=True)
    if LIBRARIES[name] - machine():
        return None
    built = ctypes.CDLL(str(to))
    built.run.argtypes, built.run.restype = [ctypes.c_char_p], ctypes.c_int64
    return built


def test_cpu(
    library: Any, wanted: tuple[torch.dtype, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if library is None:
        pytest.skip("built, but this CPU cannot run it")
    monkeypatch.setattr(pointwise, "formula_numbers", lambda: {"everything": 0})
    monkeypatch.setattr(engine, "run", lambda _kernel, _loss, arguments, _n: library.run(arguments))
    kernel = pointwise.PointwiseEngine()
    dtype, want = wanted
    shape = want[0].shape

    for call, tensors in calls(dtype):
        dense = (*(t.expand(shape).contiguous() for t in tensors[:4] if t is not None), tensors[4])
        every = None
        for given in (tensors, dense):
            for derivatives in DERIVATIVES[::-1]:
                result, grads = kernel.forward(call, given, needed(derivatives))
                check(call, tensors[4], result, grads, want)
                every = every or grads
                arrived = torch.ones_like(result)
                grads += kernel.backward(call, given, needed(derivatives), arrived)
                for k, grad in enumerate(grads):
                    assert (grad is None) is (k % 4 not in derivatives)
                    if grad is not None:
                        torch.testing.assert_close(grad, every[k % 4])
    bad = tensors[0].clone()
    bad[3, 5] = torch.inf
    with pytest.raises(torch_m.OutsideDomain):
        kernel.forward(call, (bad, *tensors[1:]), needed(()))


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
def test_triton(tmp_path: Path) -> None:
    path = tmp_path / "found.pt"
    command = [sys.executable, every_name.__file__, str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = iter(torch.load(path))
    for dtype in (torch.float32, torch.float64):
        want = exactly(dtype)
        for call, tensors in calls(dtype):
            for derivatives in DERIVATIVES[-2:]:
                result, *grads = next(found)
                assert [k for k, g in enumerate(grads[:4]) if g is not None] == list(derivatives)
                check(call, tensors[4], result, grads[:4], want)
                check(call, tensors[4], result, grads[4:], want)


def value(x, t, *, a):
    return a * x * t


def grad(x, t, *, a):
    return a * t, a * x


LINE = value.__code__.co_firstlineno


def of(*parameters: str, gives: Any = None) -> Callable[..., Any]:
    """A function of such parameters."""
    scope: dict[str, Any] = {}
    made = f"def made({', '.join(parameters)}): return gives"
    exec(f"def make(gives):\n    {made}\n    return made", scope)
    found: Callable[..., Any] = scope["make"](gives)
    return found


ONE, NAMED = torch.ones(1), ("x", "t", "*", "a")


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ((of("x"), grad), r"made takes 1 operands \(positional parameters\), not 2 to 4"),
        ((of("a", "b", "c", "d", "e"), grad), "made takes 5 operands"),
        (
            (of("x", "t", "*", *"abcde"), grad),
            r"made takes 5 numbers \(keyword-only parameters\), not",
        ),
        ((of("x", "t", "*more"), grad), "made takes more as variadic positional: name each"),
        ((value, of("x", "t")), r"made needs the parameters of value: \(x, t, \*, a\)"),
        ((value, of("t", "x", "*", "a")), "made needs the parameters of value"),
        ((value, grad, of("x", "t", "*", "b")), "made needs the parameters of value"),
        ((of(*NAMED, gives=1.0), grad), "made gives 1.0: no tensor, as it depends on no operand"),
        ((value, of(*NAMED, gives=ONE)), "made gives no tuple of derivatives"),
        ((value, of(*NAMED, gives=())), "made gives 0 derivatives by 2 operands"),
        ((value, of(*NAMED, gives=(ONE,) * 3)), "made gives 3 derivatives by 2 operands"),
        ((value, grad, of(*NAMED, gives=ONE)), "made gives no condition"),
    ],
)
def test_a_formula_that_does_not_fit_is_refused_at_import(
    functions: tuple[Callable[..., Any], ...], message: str
) -> None:
    with pytest.raises(TypeError, match=rf"^.+:\d+: {message}"):
        Pointwise(*functions)


def test_a_name_that_m_lacks_is_refused_at_import() -> None:
    def tangent(x, t, *, a):
        return torch_m.tan(x)

    line = tangent.__code__.co_firstlineno
    with pytest.raises(TypeError, match=rf"test_names.py:{line}: tangent cannot run: .*'?torch_m"):
        Pointwise(tangent, grad)


@pytest.mark.parametrize("slopes", [1, 2])
def test_a_formula_differentiates_by_what_it_says(slopes: int) -> None:
    formula = Pointwise(value, of(*NAMED, gives=(ONE, ONE)[:slopes]))
    assert formula.derivatives == slopes and formula.operands == ("x", "t")


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_numbers_have_the_digits_of_the_operands(
    default: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for dtype in (torch.float32, torch.float64):
            m = torch_m.NAMESPACES[dtype]
            x = torch.tensor([1.0, -1.0], dtype=dtype)
            for found in (m.where(x > 0, 0.9, 0.1), m.where(x > 0, 0.9, m.maximum(0.1, x))):
                assert found.dtype is dtype
                assert torch.equal(found, torch.tensor([0.9, 0.1], dtype=dtype))
            assert m.where(True, 0.9, x) == 0.9 and m.where(False, 0.9, x) is x
            assert m.maximum(x, x.neg()).tolist() == [1, 1]
    finally:
        torch.set_default_dtype(before)
