"""`fusedloss bench`: it runs end to end, its files hold, and wrong arguments are told. No speed."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

import torch
from torch._inductor.exc import InvalidCxxCompiler
from torch.nn import functional as F  # noqa: N812

import fusedloss
from fusedloss.cli import main, processes
from fusedloss.cli.bench import (
    builds,
    cases,
    compiled,
    cpu,
    harness,
    overhead,
    selection,
    tables,
    targets,
)
from fusedloss.cli.bench import command as bench
from fusedloss.front.definition import REGISTRY
from fusedloss.route import memo

TINY = harness.Plan(("ours", "eager", "yardstick"), 1, 0.0, 1e-5, 2)


def run(*words: str | Path) -> int:
    return main(["bench", *map(str, words)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def time_case(case: cases.Case, plan: harness.Plan = TINY) -> harness.Result:
    return cpu.time_case(case, plan, lambda phase, done: None)


def in_this_process(job: cpu.Job) -> Iterator[cpu.Event]:
    """Stands for `cpu.stream`."""
    for index, case in enumerate(job.cases):
        yield "progress", index, ("sampling", 0.5)
        yield "result", index, 1000 if job.memory else time_case(case)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases, measured once or twice in this process."""
    small = tuple(replace(case, shape=tuple(min(n, 5) for n in case.shape)) for case in cases.CASES)
    monkeypatch.setattr(selection, "CASES", small)
    monkeypatch.setattr(bench, "stream", in_this_process)


class Checker(HTMLParser):
    """No reference leaves the file, and no number in a plot is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href", "xlink:href"), f"{tag} refers to {value}"
            assert "nan" not in (value or "") and "inf" not in (value or ""), (tag, name, value)


def test_a_run_end_to_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, as a user runs it."""
    words = (
        "--sizes",
        "15",
        "2x3x4",
        "--only",
        "mse",
        "nll",
        "--dtype",
        "float32",
        "--threads",
        "1",
    )
    assert run(*words, "--variants", "eager", "yardstick", "--quick") == 0
    document = json.loads((here / "fusedloss-bench.json").read_text())
    assert document["complete"] and document["machine"]["threads"] == 1
    assert len(document["results"]) == 4
    for fields in document["results"]:
        result = harness.Result.from_json(fields)
        assert set(result.samples) == {"ours", "eager", "yardstick", "held"}
        assert len(set(map(len, result.samples.values()))) == 1, "a round has a sample of each"
        for pair in (("ours", "yardstick"), ("eager", "ours")):
            ratio = result.ratio(*pair)
            assert ratio is not None and math.isfinite(ratio) and ratio > 0
        assert result.same_bits and not result.wrong
        assert result.to_json() == fields
    page = (here / "fusedloss-bench.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.seen.count("svg") == 2
    printed = capsys.readouterr().out
    assert "eager / ours" in printed and "Geometric means" in printed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_in_its_own_process() -> None:
    case = cases.Case("", "mse_loss", (1024, 1024))
    job = cpu.Job((case,), TINY, memory="yardstick")
    ((*_, peak),) = [event for event in cpu.stream(job) if event[0] == "result"]
    assert peak == pytest.approx(4 * 1024**2, abs=500_000)


def test_a_process_that_dies_is_told() -> None:
    case = cases.Case("", "no such loss", (3, 5))
    ((*_, why),) = [e for e in cpu.stream(cpu.Job((case,), TINY)) if e[0] == "result"]
    assert why == "KeyError: 'no such loss'"


@pytest.mark.usefixtures("quickly")
def test_all_cases(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--no-sweep",
        "--targets",
        "--picture",
        "a.svg",
        "--variants",
        "ours",
        "eager",
        "yardstick",
    )
    assert run(*words, "--output", "a.json", "--html", "a.html") == 0
    document = json.loads((here / "a.json").read_text())
    assert [r["case"]["title"] for r in document["results"]] == [c.title for c in cases.CASES]
    for fields in document["results"]:
        result = harness.Result.from_json(fields)
        assert set(result.peaks) == {"ours", "eager", "yardstick"}
        assert ("plain" in result.samples) == bool(result.case.against_plain)
    assert (here / "a.svg").read_text().count("<path") > len(cases.CASES)
    printed = capsys.readouterr().out
    assert "NOT MET" in printed or "met" in printed
    by_text = dict(
        re.findall(r"^(\S.*?) +[≤≥] [\d.]+ +[\d.-]+ +(not measured|met|NOT MET)", printed, re.M)
    )
    assert len(by_text) == len(targets.TARGETS)
    unmeasured = {text for text, word in by_text.items() if word == "not measured"}
    assert unmeasured == {t.text for t in targets.TARGETS if "compile" in t.text or "3x5" in t.text}


# PyTorch computes these in Python, or has them not.
IN_PYTHON = {
    *("triplet_margin_with_distance_loss", "gaussian_nll_loss", "multilabel_soft_margin_loss"),
    *("sigmoid_focal_loss", "softmax_focal_loss", "dice_loss", "dice_cross_entropy", "dice_focal"),
}


def test_calls(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(overhead, "QUICK", (0.0, 1e-5, 2))
    monkeypatch.setattr(overhead, "imports", lambda times: [(1.5, 0.08)] * times)
    memo.known.clear()  # of earlier tests: each of their calls would be put aside
    few = tuple(overhead.small.cases())[::40]
    monkeypatch.setattr(overhead.small, "cases", lambda *_: few)
    before = F.mse_loss, torch._C._nn.mse_loss
    assert run("--calls", "--quick", "--threads", "1", "--output", "a.json") == 0
    assert before == (F.mse_loss, torch._C._nn.mse_loss), "put back"
    document = json.loads((here / "a.json").read_text())
    assert {r["loss"] for r in document["results"]} == {REGISTRY[key].name for key in cases.TIMED}
    small = {(r["loss"], r["option"], *r["shape"]) for r in document["small"]}
    assert small == {(c.loss, c.option, *c.shape) for c in few}
    assert all(r["ours"] > 0 and r["torch"] > 0 and r["at_most"] > 1 for r in document["small"])
    for r in document["results"]:
        assert r["ours_before"] > 0
        assert r["torch_before"] is None or 0 < r["torch_before"] < r["torch"]
    without = {r["loss"] for r in document["results"] if r["torch_before"] is None}
    assert without == IN_PYTHON
    printed = capsys.readouterr().out
    assert "beyond" in printed and "import fusedloss after it: 80 ms" in printed


def test_compiled(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By a compiler that takes the function as it is."""
    monkeypatch.setattr(compiled, "compiled", lambda function, anew: function)
    monkeypatch.setattr(compiled, "in_a_process", lambda function, *args: function(*args))
    monkeypatch.setattr(compiled, "timing", lambda quick: (0.0, 1e-5, 2))
    small = tuple(replace(case, shape=(4, 5)) for case in cases.CASES)
    monkeypatch.setattr(compiled, "CASES", small)
    monkeypatch.setattr(compiled, "DECODER", replace(compiled.DECODER, loss="mse_loss"))
    words = (
        "--only",
        "mse",
        "nll",
        "--sizes",
        "15",
        "--quick",
        "--threads",
        "1",
        "--output",
        "a.json",
    )
    try:
        assert run("--compiled", *words) == 0
    finally:
        fusedloss.unpatch()
    results = [
        harness.Result.from_json(r) for r in json.loads((here / "a.json").read_text())["results"]
    ]
    assert [set(r.samples) for r in results] == [set(compiled.LOSSES)] * 2 + [
        set(compiled.STEPS)
    ] * 2
    assert [r.case.loss for r in results] == ["mse_loss", "nll_loss"] * 2
    printed = capsys.readouterr().out
    assert "patched / plain" in printed and "of 4 targets met" in printed


def test_imports_are_timed() -> None:
    ((of_torch, of_ours),) = overhead.imports(1)
    assert 0 < of_ours < of_torch


@pytest.mark.usefixtures("quickly")
def test_against(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--sizes", "15", "--only", "mse", "--dtype", "float64")
    assert run(*words, "--output", "then.json") == 0
    then = json.loads((here / "then.json").read_text())
    for fields in then["results"]:
        fields["samples"]["ours"] = [s / 100 for s in fields["samples"]["ours"]]
    (here / "then.json").write_text(json.dumps(then))
    capsys.readouterr()
    assert run(*words, "--against", "then.json") == 0
    assert re.search(r"mse_loss float64 15 .*slower", capsys.readouterr().out)


def test_against_another_build(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is this one again: the same bits, and about the same times."""

    def stream(job: cpu.Job) -> Iterator[cpu.Event]:
        plan = replace(TINY, variants=("ours",), against=job.plan.against)
        for index, case in enumerate(job.cases):
            yield "result", index, time_case(case, plan)

    monkeypatch.setattr(bench, "stream", stream)
    words = ("--sizes", "15", "--only", "mse", "bce", "--dtype", "float32")
    try:
        assert run(*words, "--against", builds.OURS) == 0
    finally:
        for name in ("new", "old"):
            with builds.started(name, builds.OURS).process as worker:
                worker.kill()
        builds.started.cache_clear()
    printed = capsys.readouterr().out
    assert re.search(r"mse_loss float32 15 .*s +same", printed)
    assert re.search(r"The slowest against the other build: [\d.]+, \w+ float32 15; ", printed)
    for fields in json.loads((here / "fusedloss-bench.json").read_text())["results"]:
        assert set(fields["samples"]) == {"ours", "new", "old"} and fields["as_built"]
        assert harness.Result.from_json(fields).to_json() == fields


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*targets.json")), ids=lambda path: path.stem)
def test_results_of_before_are_read(path: Path) -> None:
    results = selection.earlier(path)
    assert tables.compared(results, results)
    known = {case.title for case in cases.CASES}
    assert {r.case.title for r in results if r.case.group != "sweep"} <= known


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "hinge"), "--only: must be among .*mse_loss.*, got 'hinge'"),
        (("--dtype", "int8"), "--dtype: must be among float32, .*, got 'int8'"),
        (("--sizes", "7Q"), "--sizes: must be among 15, 256, .* got '7Q'"),
        (("--sizes", "0x5"), "--sizes: must be among 15, 256, .* got '0x5'"),
        (("--sizes", "100000x1000"), "--sizes: .* at most 64M elements, got '100000x1000'"),
        (("--sizes", "15", "--no-sweep"), "--no-sweep: "),
        (("--variants", "jax"), "--variants: must be among ours, .*, got 'jax'"),
        (("--threads", "0"), "--threads: must be an integer from 1 to 4096, got '0'"),
        (("--output", "no/such/folder.json"), "--output: .*folder.json.*No such file"),
        (("--html", "."), "--html: .*Is a directory"),
        (("--picture", "a.gif"), r"--picture: must end in \.svg or \.png, got 'a.gif'"),
        (("--linear", "--picture", "no/such.svg"), "--picture: .*No such file"),
        (("--against", "."), "--against: must be a checkout or installed fusedloss, got '.'"),
        (("--linear", "--against", "."), "--against: must be a checkout .*"),
        (("--against", "missing.json"), "--against: .*missing.json.*No such file"),
        (("--against", "other.json"), "--against: .*other.json.*KeyError"),
        (("--against", "broken.json"), "--against: .*broken.json.*JSONDecodeError"),
    ],
)
def test_wrong_arguments(
    words: tuple[str, ...],
    message: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, exit code 2, nothing measured and no file made."""
    monkeypatch.setattr(bench, "stream", lambda job: pytest.fail("something was measured"))
    (here / "other.json").write_text("{}")
    (here / "broken.json").write_text("{")
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(f"fusedloss bench: {message}.*\n", captured.err)
    assert not captured.out
    assert {p.name for p in here.iterdir()} == {"other.json", "broken.json"}


def test_ctrl_c_keeps_what_is_done(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(job: cpu.Job) -> Iterator[cpu.Event]:
        yield "result", 0, time_case(job.cases[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "stream", interrupted)
    assert run("--sizes", "15", "256", "--only", "mse", "--dtype", "float32") == 130
    assert "Interrupted: 1 of 2 cases done." in capsys.readouterr().out
    document = json.loads((here / "fusedloss-bench.json").read_text())
    assert not document["complete"] and len(document["results"]) == 1


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any) -> Any:
        raise RuntimeError("backend='inductor' raised") from InvalidCxxCompiler

    monkeypatch.setattr(harness, "compiled", fail)
    plan = harness.Plan(("ours", "compile"), 1, 0.0, 1e-5, 2)
    result = time_case(cases.Case("", "mse_loss", (3, 5)), plan)
    assert result.skipped == {"compile": processes.NO_COMPILER}
    assert list(result.samples) == ["ours"]


def test_no_compiler_is_said_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stream(job: cpu.Job) -> Iterator[cpu.Event]:
        for index, case in enumerate(job.cases):
            result = time_case(case)
            if "compile" in job.plan.variants:
                result.skipped["compile"] = processes.NO_COMPILER
            yield "result", index, result

    monkeypatch.setattr(bench, "stream", stream)
    assert run("--sizes", "15", "--only", "mse", "nll", "--dtype", "float32") == 0
    assert capsys.readouterr().out.count(processes.NO_COMPILER) == 1


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    row = REGISTRY["mse_loss"]

    @functools.wraps(row.function)
    def twice(*args: Any, **kwargs: Any) -> Any:
        return 2 * row.function(*args, **kwargs)

    monkeypatch.setitem(REGISTRY, "mse_loss", row._replace(function=twice))
    result = time_case(cases.Case("", "mse_loss", (3, 5)))
    assert result.wrong and result.difference == pytest.approx(1)


def test_gradients_too_small_for_their_type_are_not_wrong() -> None:
    assert not time_case(cases.Case("", "mse_loss", (1024, 1024), "float16")).wrong


def test_every_loss_is_swept() -> None:
    points = list(cases.sweep(cases.TIMED, cases.DTYPES, cases.SIZES))
    assert len({p.title for p in points}) == len(points)
    assert {p.loss for p in points} == set(cases.TIMED)
    assert all(max(p.shape) and p.numel <= cases.LARGEST for p in points)


def test_every_loss_has_cases() -> None:
    """Of its own on the CPU; and in `--calls` and on a GPU it is there of itself."""
    assert {c.loss for c in cases.CASES} == set(cases.TIMED)
    titles = [c.title for c in (*cases.CASES, *cases.GPU_CASES)]
    assert len(set(titles)) == len(titles)
    names = {REGISTRY[key].name for key in cases.TIMED}
    assert {REGISTRY[key].name for key in cases.calls()} == names
    assert {c.row.name for c in cases.GPU_CASES if c.group == "small"} == names
    for case in cases.CASES:
        assert case.option in ("", *case.row.options)
        assert case.against_plain is None or case.against_plain in REGISTRY
        rod = harness.Work(replace(case, shape=tuple(min(n, 5) for n in case.shape))).yardstick
        named = case.at_most.keys() - {"eager", "compile", "plain"}
        assert named <= set(targets.YARDSTICKS) and all(map(rod.endswith, named))


@pytest.mark.parametrize("key", cases.TIMED)
def test_a_yardstick_moves_the_bytes(key: str) -> None:
    """It makes as many results as the loss has gradients, of their shape, and again in place."""
    import torch

    work = harness.Work(cases.Case("", key, (4, 6)))
    rod = cases.yardstick(REGISTRY[key], work.bare)
    fresh = rod.fresh(*work.bare)
    assert [t.shape for t in fresh] == [leaf.shape for leaf in work.leaves]
    held = [torch.full_like(t, 7.0) for t in fresh]
    rod.held(held, *work.bare)
    assert all(map(torch.equal, held, fresh))


def test_a_ratio_is_taken_within_rounds() -> None:
    case = cases.Case("", "mse_loss", (3, 5))
    result = harness.Result(case, {"ours": [1.0, 20.0, 3.0], "eager": [2.0, 40.0, 9.0]})
    assert result.ratio("eager", "ours") == 2.0
    assert result.quartiles("ours") == (2.0, 3.0, 11.5)
    assert result.ratio("ours", "compile") is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (2.0, "2.00 s"), (0.01234, "12.3 ms"), (2.5e-4, "250 µs"), (5e-8, "0.05 µs")],
)
def test_clock(seconds: float | None, text: str) -> None:
    assert tables.clock(seconds) == text
