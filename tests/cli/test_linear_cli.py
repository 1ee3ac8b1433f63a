"""`fusedloss bench --linear` and `fusedloss demo --lm`: they run end to end, and memory stays in its budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from fusedloss.cli import decoder, main
from fusedloss.cli.bench import heads as linear
from fusedloss.cli.bench.harness import Plan
from fusedloss.cli.bench.heads import head, in_a_process
from fusedloss.cli.demo import lm
from fusedloss.cli.processes import MEBI

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)


PLAN = Plan((), 2, 0.0, 0.0, 1, work=linear.HeadWork)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_this_process(function: Any, *args: Any) -> Any:
    return 1000 if function is linear.peak_memory else function(*args)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "budget"), [("ours", 64), ("forward", 16), ("eager", None)], ids=str
)
def test_memory_stays_in_its_budget(variant: str, budget: int | None) -> None:
    """Beside the gradients, of rows whose logits would be 131 MB."""
    case = head("", 1024, 64, 32000, "float32")
    logits, gradients = linear.sizes(case)
    gradients *= variant != "forward"
    beyond = (in_a_process(linear.peak_memory, case, variant, PLAN) - gradients) / MEBI
    assert 0 < beyond <= budget if budget else beyond > 2 * logits / MEBI


def test_samples_of_long_calls_follow_a_call_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What eager's logits were leaves small pages behind, for which the next call of any variant would pay."""
    called: list[str] = []

    def step(self: linear.HeadWork, variant: str) -> Any:
        return lambda: called.append(variant)

    monkeypatch.setattr(linear.HeadWork, "step", step)
    plan = Plan(("ours", "lazy", "eager"), 1, 0.0, 0.0, 4, 4, work=linear.HeadWork)
    linear.time_case(head("table", 3, 4, 5, "float32"), plan)
    rounds = called[-2 * 3 * 4 :]
    assert rounds[::2] == rounds[1::2] and len(set(rounds)) == 3


@pytest.mark.parametrize("older", [False, True])
def test_bench(older: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """An older torch has no chunks of its own: they are left out, and the rest is measured."""
    if older:
        for home, name in (
            (torch.nn, "LinearCrossEntropyOptions"),
            (torch.nn.functional, "linear_cross_entropy"),
        ):
            monkeypatch.delattr(home, name, raising=False)
    small = [head("rows", 8, 4, v, dtype) for v in (16, 32) for dtype in ("float32", "bfloat16")]
    small += [head("classes", 8, 4, v, "float32") for v in (16, 32)]
    monkeypatch.setattr(linear, "cases", lambda quick: small)
    monkeypatch.setattr(linear, "in_a_process", in_this_process)
    words = ("--quick", "--threads", "1", "--output", "out.json", "--picture", "out.svg")
    assert main(["bench", "--linear", *words]) == 0
    document = json.loads((here / "out.json").read_text())
    assert document["complete"] and document["kind"] == "linear"
    results = document["results"]
    assert [len(r["samples"]["ours"]) for r in results[:4]] == [2] * 4
    assert all(not r["samples"] and "lazy" in r["peaks"] for r in results[4:])  # memory alone
    printed = capsys.readouterr().out
    assert "ours / products" in printed and (not older or "Left out: PyTorch in chunks" in printed)
    assert (here / "out.svg").read_text().count("<path") > 4


def test_a_failing_case_is_told(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(linear, "cases", lambda quick: [head("", 8, 4, 16, "no type")])
    monkeypatch.setattr(linear, "why_not", lambda case, variant: None)
    assert main(["bench", "--linear", "--output", "out.json"]) == 1
    assert "no type" in capsys.readouterr().out


def test_language_model(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("tokenizers")
    text = lm.corpus()[:60_000]
    monkeypatch.setattr(lm, "corpus", lambda: text)
    monkeypatch.setattr(lm, "in_a_process", lambda f, *args: f(*args))
    monkeypatch.setattr(lm, "RATE", 0.5)
    for name, size in {"VOCABULARY": 600, "FEATURES": 16, "CONTEXT": 16, "QUICK_STEPS": 30}.items():
        for module in (lm, decoder):
            monkeypatch.setattr(module, name, size, raising=False)
    assert main(["demo", "--lm", "--quick"]) == 0
    report = json.loads((here / "fusedloss-lm.json").read_text())
    assert report["vocabulary"] == 600
    curves = [way["losses"] for way in report["ways"].values()]
    assert len(curves) >= 2 and all(min(curve) < curve[0] - 0.05 for curve in curves)
    assert (here / "fusedloss-lm.png").stat().st_size > 10_000
    assert "The loss curves agree" in capsys.readouterr().out


def test_a_wrong_gradient_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    ours = lm.fusedloss.linear_cross_entropy

    def wrong(*args: Any) -> Any:
        loss = ours(*args)
        return loss.detach() - 0.5 * (loss.detach() - loss)

    monkeypatch.setattr(lm.fusedloss, "linear_cross_entropy", wrong)
    text = lm.corpus()[:60_000]
    monkeypatch.setattr(lm, "corpus", lambda: text)
    monkeypatch.setattr(lm, "in_a_process", lambda f, *args: f(*args))
    monkeypatch.setattr(lm, "RATE", 0.5)
    for name, size in {"VOCABULARY": 600, "FEATURES": 16, "CONTEXT": 16, "QUICK_STEPS": 30}.items():
        for module in (lm, decoder):
            monkeypatch.setattr(module, name, size, raising=False)
    assert main(["demo", "--lm", "--quick", "--no-plot"]) == 1
