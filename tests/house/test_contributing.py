"""CONTRIBUTING.md is run: its example, put into a copy without it, builds and passes the registry's tests."""

from __future__ import annotations

import re
from pathlib import Path

import elsewhere
import pytest

from fusedloss.front.definition import REGISTRY

MOST_LINES = 40
HOME = "src/fusedloss/losses"
TEXT = (elsewhere.ROOT / "CONTRIBUTING.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(FILE,) = set(re.findall(r"as it stands in `losses/(\w+\.py)`", TEXT))


def test_example_is_short() -> None:
    assert sum(bool(line.strip()) for line in EXAMPLE.splitlines()) <= MOST_LINES


def test_readme_lists_every_loss() -> None:
    """All of PyTorch in one row (tests/faces/test_compatibility.py compares the lists), and each of our own."""
    text = (elsewhere.ROOT / "README.md").read_text()
    assert "| every loss of `torch.nn`, " in text
    own = {row.name for row in REGISTRY.values() if not row.module}
    assert own <= set(re.findall(r"`(\w+)`", text))


def test_every_room_is_named() -> None:
    rooms = {p.name for p in (elsewhere.ROOT / "src/fusedloss").iterdir() if p.is_dir()}
    named = set(re.findall(r"^\| `(\w+)/`", TEXT, re.MULTILINE))
    assert rooms - {"__pycache__"} <= named


@pytest.mark.slow
def test_example_makes_a_loss_that_passes(tmp_path: Path) -> None:
    root = elsewhere.copy(tmp_path / "copy")
    file = root / HOME / FILE
    assert file.read_text().count(EXAMPLE) == 1
    file.write_text(file.read_text().replace(EXAMPLE, ""))
    assert "huber" not in file.read_text()
    with file.open("a") as end:
        end.write(EXAMPLE)
    elsewhere.build(root, "-O1")
    arguments = ["-k", "huber", "tests/losses", "tests/faces/test_faces.py"]
    done = elsewhere.pytest_there(root, arguments, {"FUSEDLOSS_TEST_EVERY": "30"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 20, done.stdout[-2000:]
