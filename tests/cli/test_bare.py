"""The command where torch is installed alone: help, and what is missing, without a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bare
import pytest
from elsewhere import ROOT

import fusedloss
from fusedloss.cli import COMMANDS

SCRIPT = """
import contextlib, io, json
from fusedloss.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
    found.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""


def run(folder: Path, *commands: str) -> list[tuple[int, str, str]]:
    """Code, output and errors of each, in one process that has what is in the folder."""
    done = bare.python(folder, SCRIPT, json.dumps([words.split() for words in commands]))
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return [tuple(each) for each in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Torch and this library."""
    folder = bare.fill(tmp_path_factory.mktemp("alone"), "torch")
    (folder / "fusedloss").symlink_to(ROOT / "src/fusedloss")
    return folder


def test_torch_alone(alone: Path) -> None:
    asked = ["--version", "--help", "info", *(f"{name} --help" for name in COMMANDS)]
    answers = run(alone, *asked)
    assert [(code, err) for code, _, err in answers] == [(0, "")] * len(asked)
    assert answers[0][1] == f"fusedloss {fusedloss.__version__}\n"
    for name, (_, out, _) in zip(COMMANDS, answers[3:], strict=True):
        assert out.startswith(f"usage: fusedloss {name}")
        assert "show this help message and exit" in out


def test_what_is_missing_is_said_at_once(alone: Path) -> None:
    names = ("demo", "demo --lm --no-plot", "bench", "bench --picture a.svg", "verify")
    said = [err for code, out, err in run(alone, *names) if code == 2 and not out]
    assert said == [
        "fusedloss demo: needs rich and scikit-learn and matplotlib, which are not installed: run pip install "
        "rich scikit-learn matplotlib\n",
        "fusedloss demo: needs rich and tokenizers, which are not installed: run pip install rich tokenizers\n",
        "fusedloss bench: needs rich, which is not installed: run pip install rich\n",
        "fusedloss bench: needs rich and matplotlib, which are not installed: run pip install rich "
        "matplotlib\n",
        "fusedloss verify: needs rich, which is not installed: run pip install rich\n",
    ]


def test_rich_alone(tmp_path: Path) -> None:
    """What measures runs without NumPy; Triton's interpreter alone needs that."""
    folder = bare.fill(tmp_path / "rich", "torch", "rich", "triton")
    (folder / "fusedloss").symlink_to(ROOT / "src/fusedloss")
    only = "verify --only mse --dtype float32"
    (code, out, err), quick = run(folder, only, f"{only} --quick")
    assert (code, out) == (2, "") and "needs numpy, which is not installed" in err
    assert quick[0] == 0 and "Every error is within its bound." in quick[1], quick
