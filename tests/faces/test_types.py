"""What type checkers see: torch's own types through our faces, and those of the losses."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import stubs
import torch
from elsewhere import ROOT

USER = """
from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import SGD

import fusedloss
from fusedloss import functional as F
from fusedloss import nn
import fusedloss.nn.functional as also
from fusedloss.nn.utils.rnn import pad_sequence
from fusedloss.nn.parameter import Parameter


class Model(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1))
        self.head: torch.nn.Linear = nn.Linear(32, classes)
        self.scale = nn.Parameter(torch.ones(()))
        self.loss: torch.nn.CrossEntropyLoss = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.focal = nn.SoftmaxFocalLoss(gamma=2.0)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden: Tensor = self.layers(x)
        logits = F.linear(hidden, self.head.weight) * self.scale
        return F.cross_entropy(logits, target, ignore_index=-1) + also.relu(hidden).mean()

    def fused(self, x: Tensor, target: Tensor) -> Tensor:
        loss = fusedloss.linear_cross_entropy(x, self.head.weight, target, z_loss=1e-4)
        return loss + fusedloss.linear_log_prob(x, self.head.weight, target).mean()


def step(model: Model, x: Tensor, target: Tensor) -> float:
    optimizer = SGD(model.parameters(), lr=0.1)
    with fusedloss.patched(heads=True):
        loss = model.forward(x, target) + model.loss.forward(x, target)
    optimizer.step()
    found = fusedloss.linear_log_prob(x, model.head.weight, target, statistics=True)
    entropy: Tensor = found.entropy
    print(fusedloss.explain(F.mse_loss, x, x).kernel, fusedloss.__version__)
    return loss.item() + entropy.mean().item()


def padded(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows) + pad_sequence(rows)


def weights(layer: Parameter) -> nn.Parameter:
    return layer


F.mse_loss("a", "b")  # wrong
F.binary_cross_entropy_with_logits(torch.ones(1), torch.ones(1), label_smoothing=0.1)
F.mse_loss(torch.ones(1), torch.ones(1), label_smoothing=0.1)  # wrong
nn.MSELoss(margin=1.0)  # wrong
nn.NoSuchLoss()  # wrong
F.no_such_loss()  # wrong
fusedloss.no_such_loss()  # wrong
Model("many")  # wrong
word: str = F.kl_div(torch.ones(1), torch.ones(1))  # wrong
"""
WRONG = {k for k, line in enumerate(USER.splitlines(), 1) if line.endswith("# wrong")}


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A project that knows this checkout as an installed package: by a link, without what stands beside it."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "fusedloss").symlink_to(ROOT / "src/fusedloss")
    (tmp_path / "user.py").write_text(USER)
    return tmp_path


def checked(folder: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy comes with the extra `lint`")
def test_mypy(user: Path) -> None:
    words = ("-m", "mypy", "--strict", "--follow-imports=silent", "--no-incremental", "user.py")
    out = checked(user, sys.executable, *words, MYPYPATH=str(user / "installed"))
    found = {int(m[1]) for m in re.finditer(r"^user\.py:(\d+): error", out, re.MULTILINE)}
    assert found == WRONG, out


def pyright() -> str | None:
    for name in ("basedpyright", "pyright"):
        if path := shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
            return path
    return None


@pytest.mark.slow
@pytest.mark.skipif(pyright() is None, reason="pyright is not installed")
def test_pyright(user: Path) -> None:
    settings = {"typeCheckingMode": "standard", "extraPaths": ["installed"], "include": ["user.py"]}
    (user / "pyrightconfig.json").write_text(json.dumps(settings))
    found = json.loads(
        checked(user, str(pyright()), "--outputjson", "--pythonpath", sys.executable)
    )
    errors = [d for d in found["generalDiagnostics"] if d["severity"] == "error"]
    assert {d["range"]["start"]["line"] + 1 for d in errors} == WRONG, errors


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the stubs are of 2.13's signatures"
)
@pytest.mark.parametrize("name", stubs.stubs())
def test_stubs_are_those_of_the_definitions(name: str) -> None:
    written, made = (ast.parse(t) for t in ((stubs.HOME / name).read_text(), stubs.stubs()[name]))
    imports = (ast.Import, ast.ImportFrom)
    for tree in (written, made):
        tree.body.sort(key=lambda node: (not isinstance(node, imports), ast.dump(node)))
    assert ast.dump(written) == ast.dump(made), "run python tests/stubs.py"
