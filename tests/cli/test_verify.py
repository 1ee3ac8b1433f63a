"""`fusedloss verify`: what it measures, what it refuses, and the page that it writes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedloss.cli import main
from fusedloss.cli.arguments import chosen_losses
from fusedloss.cli.verify import exact, measured
from fusedloss.cli.verify.arguments import DTYPES
from fusedloss.cli.verify.command import (
    QUANTITIES,
    QUICK,
    VERIFIED,
    bound,
    expected,
    figure,
)
from fusedloss.cli.verify.probes import probes
from fusedloss.engines import cpu
from fusedloss.front.definition import REGISTRY
from fusedloss.kinds.names import CONSTANTS, FUNCTIONS
from fusedloss.route import memo

PAGE = Path(__file__).parent.parent.parent / "docs" / "accuracy.md"
FORMULA = measured.Path("formula")


def absent(loss: str, dtype: str, quantity: str) -> bool:
    """What PyTorch has not: half types there, and CTC's gradient before log_softmax."""
    sequences = REGISTRY[loss].kind == "sequences"
    if dtype == "bfloat16":
        return sequences or REGISTRY[loss].kind == "margins"
    return sequences and quantity == "gradient"


# One of each kind: the half types of the others are left to `make nightly`.
KINDS = list({REGISTRY[key].kind: key for key in VERIFIED}.values())


@pytest.mark.parametrize(
    ("dtypes", "losses"),
    [
        pytest.param(QUICK[:1], VERIFIED, id=QUICK[0]),
        pytest.param(QUICK[1:], KINDS, id=QUICK[1]),
        pytest.param(QUICK, VERIFIED, id="all", marks=pytest.mark.nightly),
    ],
)
def test_quick_passes_and_covers_everything(
    dtypes: Sequence[str], losses: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "verify.json"
    few = () if dtypes == QUICK else ("--dtype", *dtypes)
    assert main(["verify", "--quick", *few, "--only", *losses, "--json", str(file)]) == 0
    document, keys = json.loads(file.read_text()), chosen_losses(losses, VERIFIED)
    paths = [path.name for path in measured.paths(every=False)]
    assert {(r["loss"], r["dtype"], r["quantity"], r["path"]) for r in document["errors"]} == {
        (loss, dtype, quantity, path)
        for loss in keys
        for dtype in dtypes
        for quantity in QUANTITIES
        for path in paths
        if path != measured.PYTORCH.name or not absent(loss, dtype, quantity)
    }
    for row in document["errors"]:
        assert row["exceeded"] == 0 and row["count"] > 0
        path = next(p for p in measured.paths(every=False) if p.name == row["path"])
        assert row["bound"] == bound(REGISTRY[row["loss"]], torch.float32, row["quantity"], path)
    assert {s["loss"] for s in document["sums"]} == {
        key for key in keys if REGISTRY[key].reductions
    }


Forward = Callable[..., tuple[Tensor, list[Tensor | None]]]


def plant(engine: Any, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., Any]) -> None:
    forward: Forward = engine.forward

    def spoilt(call: Any, tensors: Any, needed: Any) -> Any:
        return spoil(call, *forward(call, tensors, needed))

    monkeypatch.setattr(engine, "forward", spoilt)
    # A repeated call goes straight to the kernel.
    monkeypatch.setattr(memo, "known", {})
    monkeypatch.setattr(engine, "prepare", lambda *_: None)


WRONG = 1 + 2.0**-20  # 8 ulp of float32


def wrong_value(call: Any, value: Tensor, grads: list[Tensor]) -> Any:
    return value * WRONG, grads


def wrong_gradient(call: Any, value: Tensor, grads: list[Tensor | None]) -> Any:
    return value, [None if g is None else g * WRONG for g in grads]


def wrong_sum(call: Any, value: Tensor, grads: list[Tensor]) -> Any:
    return (value if call.reduction == "none" else value * WRONG), grads


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (wrong_value, "value, avx2|value, default|value, avx512"),
        (wrong_gradient, "gradient, "),
        (wrong_sum, "sum of 65,536 terms"),
    ],
)
def test_a_planted_error_fails(
    spoil: Callable[..., Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["verify", "--quick", "--only", "mse", "--dtype", "float32"]
    assert main(arguments) == 0
    plant(cpu.ENGINES["pointwise"], monkeypatch, spoil)
    assert main(arguments) == 1
    assert re.search(rf"^mse_loss, float32, ({words}).* beyond", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("key", VERIFIED)
def test_the_reference_is_the_formula(key: str) -> None:
    """50 digits and float64 torch agree on the bulk: neither misreads the definition."""
    for probe in probes(key, torch.float64, 40):
        call = measured.captured(probe)
        if call is None or probe.kind != "bulk":
            continue
        wanted = expected(probe, *call)
        with FORMULA.chosen():
            for how, results in measured.answer(probe, FORMULA):
                for result, want in zip(results, wanted, strict=True):
                    if result is not None:
                        torch.testing.assert_close(
                            result,
                            want.high,
                            rtol=1e-12,
                            atol=1e-13,
                            msg=lambda m: f"{how}: {m}",  # noqa: B023
                        )


def test_every_name_of_the_formulas_has_its_digits() -> None:
    for name in (*FUNCTIONS, *CONSTANTS):
        assert hasattr(exact.m, name)
    one = exact.mp.mpf(1)
    assert abs(exact.m.log_sigmoid(200 * one) + exact.mp.exp(-200 * one)) < 1e-170
    assert exact.m.log(0 * one) == -exact.mp.inf and exact.mp.isnan(exact.m.log(-one))
    assert exact.mp.isnan(exact.m.maximum(exact.mp.nan, 1.0))


INF = math.inf


@pytest.mark.parametrize(
    ("dtype", "found", "want", "error"),
    [
        (torch.float32, 1 + 2.0**-23, 1.0, 1.0),
        (torch.float32, 1.0, 1 - 2.0**-25, 0.5),
        (torch.float32, 0.0, 2.0**-150, 0.125),  # 4 of the smallest numbers are an ulp
        (torch.float64, 1 + 2.0**-52, 1.0, 1.0),
        (torch.bfloat16, 1 + 2.0**-7, 1.0, 1.0),
        (torch.float16, INF, 70000.0, 0.0),
        (torch.float16, 65504.0, 70000.0, 0.0),
        (torch.float16, -INF, 70000.0, INF),
        (torch.float32, math.nan, 1.0, INF),
        (torch.float32, math.nan, math.nan, 0.0),
        (torch.float32, 1.0, math.nan, INF),
        (torch.float32, INF, INF, 0.0),
    ],
)
def test_ulps(dtype: torch.dtype, found: float, want: float, error: float) -> None:
    nothing = torch.zeros(1, dtype=torch.float64)
    wanted = exact.Exact(torch.tensor([want], dtype=torch.float64), nothing, nothing)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    got, _ = measured.errors(torch.tensor([found], dtype=dtype), wanted, 2.0, compute)
    assert got.item() == error


def test_the_unit_is_what_a_rounding_of_the_inputs_does() -> None:
    x = torch.tensor([[30.25, 0.5, -1.0]])
    probe = next(probes("cross_entropy", torch.float32, 20))
    call, _ = measured.captured(probe) or pytest.fail("no call")
    value, gradient = exact.reference(call, (x, torch.tensor([0]), None))
    p = x.double().softmax(1)[0]
    moved = x.double()[0].abs() * 2.0**-23  # 1 and -1 are exact
    moved[2] = 0
    others = p[1] + p[2]
    torch.testing.assert_close(value.unit[0], others * moved[0] + p[1] * moved[1])
    torch.testing.assert_close(
        gradient.unit[0, 1], p[1] * (moved[0] * p[0] + moved[1] * (1 - p[1]))
    )


def table_rows() -> Iterator[list[str]]:
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0].startswith("`"):
            yield cells


def test_the_page_states_the_bounds_of_the_records() -> None:
    seen = set()
    for loss, dtype, quantity, ours, ours_bound, formulas, formula_bound, _ in table_rows():
        row, compute = (
            REGISTRY[loss.strip("`")],
            torch.float64 if dtype == "float64" else torch.float32,
        )
        half = "½ + {}*" if DTYPES[dtype] in (torch.bfloat16, torch.float16) else "{}"
        kernel = bound(row, compute, quantity, measured.Path("avx2"))
        assert ours_bound == half.format(f"{kernel:g}")
        assert formula_bound == half.format(f"{bound(row, compute, quantity, FORMULA):g}")
        if half == "{}":
            assert float(ours.split()[0]) <= float(ours_bound)
            assert float(formulas.split()[0]) <= float(formula_bound)
        seen.add((row.key, dtype, quantity))
    judged = [k for k in VERIFIED if REGISTRY[k].kind != "heads"]
    assert seen >= {(k, d, q) for k in judged for d in DTYPES for q in QUANTITIES}
    assert f"within {figure(measured.SUM_BOUND).rstrip('0').rstrip('.')} ulp" in PAGE.read_text()


def test_the_page_states_the_bounds_of_triton() -> None:
    row = REGISTRY["cross_entropy[probabilities]"]
    value, gradient = (
        bound(row, torch.float32, quantity, measured.Path(measured.TRITON))
        for quantity in QUANTITIES
    )
    assert {r.bounds.triton for r in REGISTRY.values()} == {None, (value, gradient)}
    assert f"held to {value:g} ulp and {gradient:g} of its gradient" in " ".join(
        PAGE.read_text().split()
    )


def test_missing_mpmath_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mpmath", None)
    assert main(["verify", "--quick"]) == 2
    words = "fusedloss verify: needs mpmath, which is not installed: run pip install mpmath\n"
    assert capsys.readouterr().err == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "nothing"], "--only: must be among"),
        (["--dtype", "int8"], "--dtype: must be among"),
        (["--json", "/nowhere/x.json"], "--json: must be a file that can be written"),
        (["--markdown", "no such page"], "--markdown: must be a page with the lines"),
        (["--markdown", __file__], "--markdown: must be a page with the lines"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_picture(tmp_path: Path) -> None:
    file = tmp_path / "accuracy.png"
    assert main(["verify", "--picture", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
