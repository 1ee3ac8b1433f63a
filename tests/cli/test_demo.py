"""`fusedloss demo`: every task trains as with torch.nn, and a loss that is wrong does not pass."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedloss.nn
from fusedloss.cli import COMMANDS, main
from fusedloss.cli.demo import command as demo
from fusedloss.cli.demo.tasks import TASKS, Task, triplets_of

each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.loss)


def plant(monkeypatch: pytest.MonkeyPatch, task: Task, value: float, slope: float) -> None:
    """Scale what PyTorch's loss returns, and what it sends back, in place of ours."""

    class Wrong(task.reference):  # type: ignore[misc]
        def forward(self, *tensors: Tensor) -> Tensor:
            loss: Tensor = super().forward(*tensors)
            return value * loss.detach() + slope * (loss - loss.detach())

    monkeypatch.setattr(fusedloss.nn, task.loss, Wrong)


@each_task
def test_task(task: Task) -> None:
    result = demo.train(task, seed=1, epochs=max(1, task.epochs // demo.QUICK))
    assert result.wrong is None, demo.verdict([result])
    before, (theirs, ours) = result.before, result.scores
    assert math.isclose(theirs, ours, abs_tol=0.01)
    assert ours < 0.7 * before if task.metric == "RMSE" else ours > before
    assert result.torch[-5:].mean() < 0.8 * result.torch[:5].mean()
    assert not np.array_equal(result.torch, result.float64)


@each_task
@pytest.mark.parametrize(("value", "slope"), [(1.0, 1.001), (1.0001, 1.0), (math.nan, 1.0)])
def test_wrong_loss_is_found(
    task: Task, value: float, slope: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, task, value, slope)
    result = demo.train(task, seed=0, epochs=2)
    assert result.wrong is not None
    assert result.wrong < 5
    (line,) = demo.verdict([result])
    assert f"{task.loss}, step {result.wrong}" in line


def test_right_loss_that_rounds_otherwise_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rounded(torch.nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input.double(), target.double()).float()

    monkeypatch.setattr(fusedloss.nn, "MSELoss", Rounded)
    result = demo.train(TASKS[0], seed=0, epochs=20)
    assert result.difference.max() > 0.0
    assert result.parts is None


def made(loss: str, fusedloss: list[float], fusedloss_error: list[float]) -> demo.Result:
    steps = len(fusedloss)
    return demo.Result(
        task=next(task for task in TASKS if task.loss == loss),
        before=0.5,
        scores=(0.9, 0.9),
        microseconds=(1.0, 1.0),
        torch=np.ones(steps),
        fusedloss=np.array(fusedloss),
        float64=np.full(steps, 1.0 + 1e-7),
        torch_error=np.full(steps, 1e-7),
        fusedloss_error=np.array(fusedloss_error),
    )


def test_only_a_hinge_may_set_curves_apart() -> None:
    curve, errors = [1.0, 1.0, 1.001], [1e-7, 1e-7, 1e-7]
    hinge = made("TripletMarginLoss", curve, errors)
    assert (hinge.parts, hinge.wrong) == (2, None)
    (line,) = demo.verdict([hinge])
    assert "hinge" in line
    smooth = made("MSELoss", curve, errors)
    assert (smooth.parts, smooth.wrong) == (2, 2)
    wrong = made("TripletMarginLoss", curve, [1e-7, 1e-3, 1e-7])
    assert (wrong.parts, wrong.wrong) == (2, 2)


def test_triplets() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40,), generator=generator)
    chosen: set[tuple[int, int]] = set()
    for _ in range(200):
        anchors = torch.randperm(len(labels), generator=generator)[:10]
        rows = triplets_of(anchors, labels, generator)
        assert torch.equal(rows[0], anchors)
        assert (rows[0] != rows[1]).all()
        assert (labels[rows[0]] == labels[rows[1]]).all()
        assert (labels[rows[0]] != labels[rows[2]]).all()
        chosen.update((index, row) for index in (1, 2) for row in rows[index].tolist())
    assert chosen == {(index, row) for index in (1, 2) for row in range(len(labels))}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "folder"
    threads = torch.get_num_threads()
    assert main(["demo", "--quick", "--only", "mse", "NLLLoss", "--output", str(output)]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "diabetes progression" in printed
    assert "Every curve is PyTorch's" in printed
    assert (output / "fusedloss-demo.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((output / "fusedloss-demo.json").read_text())
    assert [task["loss"] for task in found["tasks"]] == ["MSELoss", "NLLLoss"]
    assert found["versions"]["torch"] == torch.__version__
    for task in found["tasks"]:
        assert task["wrong_at_step"] is None
        assert {len(curve) for curve in task["curves"].values()} == {task["steps"]}


def test_command_with_a_wrong_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, TASKS[0], math.nan, 1.0)
    words = ["demo", "--quick", "--no-plot", "--only", "MSE", "--output", str(tmp_path)]
    assert main(words) == 1
    assert "rounding explains only" in " ".join(capsys.readouterr().out.split())
    assert "NaN" not in (tmp_path / "fusedloss-demo.json").read_text()
    assert not (tmp_path / "fusedloss-demo.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "hinge"], "--only: must be among MSELoss, "),
        (["--seed", "-1"], "--seed"),
        (["--seed", "x"], "must be an integer from 0 to 2**32 - 1, got 'x'"),
    ],
)
def test_bad_argument(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["demo", *words])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_output_that_is_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["demo", "--output", str(file)]) == 2
    error = capsys.readouterr().err
    assert "--output: must be a directory that can be written to" in error
    assert str(file) in error


def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = demo.train

    def interrupted(task: Task, *arguments: object) -> demo.Result:
        if task.loss == "BCELoss":
            raise KeyboardInterrupt
        return train(task, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "train", interrupted)
    words = ["demo", "--quick", "--only", "mse", "bce", "--output", str(tmp_path)]
    assert main(words) == 130
    printed = capsys.readouterr().out
    assert "diabetes progression" in printed
    assert "Interrupted: 1 of 2 tasks" in printed
    assert not list(tmp_path.iterdir())


def test_missing_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "fusedloss demo: needs scikit-learn, which is not installed: run pip install scikit-learn\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_subcommand_has_its_module(name: str) -> None:
    module = importlib.import_module(f"fusedloss.cli.{name}")
    assert all(map(callable, (module.add_arguments, module.needs, module.run)))


def test_the_command_says_how_many_models_it_trains() -> None:
    assert len(TASKS) == 14 and "fourteen models" in COMMANDS["demo"]
