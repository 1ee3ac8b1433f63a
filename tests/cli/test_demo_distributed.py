"""`fusedloss demo --distributed`: two processes train as one does, and what differs does not pass."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fusedloss.cli import main
from fusedloss.cli.demo import distributed, lm


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    text = lm.corpus()[:60_000]
    monkeypatch.setattr(distributed, "corpus", lambda: text)
    monkeypatch.setattr(distributed, "VOCABULARY", 601)  # shards of 301 and 300


def test_command(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--distributed", "--quick", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "fusedloss-distributed.json").read_text())
    assert report["vocabulary"] == 601 and report["same_on_all_processes"]
    assert {way: len(ranks) for way, ranks in report["ways"].items()} == {
        "one": 1,
        "data": 2,
        "classes": 2,
    }
    for ranks in report["ways"].values():
        for each in ranks:
            assert each["losses"][-1] < each["losses"][0] - 0.05 and each["peak"] > 0
    assert (tmp_path / "fusedloss-distributed.png").read_bytes().startswith(b"\x89PNG")
    assert "The loss curves agree" in capsys.readouterr().out


def made(*losses: float) -> distributed.Training:
    return distributed.Training(list(losses), seconds=0.1, peak=1 << 20)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ((3.0, 2.01), "do not agree: at most 5.0e-03 apart"),
        ((3.0, math.nan), "do not agree: at most inf apart"),
        ((3.0, 2.00001), "and differ from process to process"),
    ],
)
def test_what_differs(
    second: Any,
    words: str,
    small: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def found(way: str, *_: Any) -> list[distributed.Training]:
        same = made(3.0, 2.0)
        return [same] if way == "one" else [same, made(*second) if way == "data" else same]

    monkeypatch.setattr(distributed, "on_processes", found)
    words_of_command = ["demo", "--distributed", "--no-plot", "--output", str(tmp_path)]
    assert main(words_of_command) == 1
    assert words in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "fusedloss-distributed.png").exists()


def test_one_model_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--lm", "--distributed"])
    assert "not allowed with argument --lm" in capsys.readouterr().err
