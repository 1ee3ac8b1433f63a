"""What a profiler, anomaly mode and the graph call a loss; and `checks`, by thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import CASES, Case, no_head
from torch import Generator, Tensor

import fusedloss
from fusedloss import functional
from fusedloss.core import trace
from fusedloss.route import memo

EAGER = list(filter(no_head, CASES))
each_case = pytest.mark.parametrize("case", EAGER, ids=str)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    memo.known.clear()
    yield
    memo.known.clear()


@each_case
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_nodes_bear_the_name_of_the_loss(case: Case, reduction: str, generator: Generator) -> None:
    if case.option.startswith("lambda"):
        return  # whose distances are the caller's nodes
    tensors, options = case.example((4, 5), torch.float32, generator)
    leaf = tensors[0].clone().requires_grad_()
    for _ in range(3):
        value = case.loss.function(leaf, *tensors[1:], **options, reduction=reduction)
        assert value.grad_fn is not None
        assert value.grad_fn.name() == f"fusedloss::{case.loss.name}Backward"


def events(run: Callable[[], object]) -> list[str]:
    with torch.profiler.profile() as profiler:
        run()
    return [event.name for event in profiler.events()]


@each_case
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_profiler_names_the_loss(case: Case, reduction: str, generator: Generator) -> None:
    tensors, options = case.example((4, 5), torch.float32, generator)
    leaf, name = tensors[0].clone().requires_grad_(), f"fusedloss::{case.loss.name}"

    def loss(first: Tensor) -> Tensor:
        return case.loss.function(first, *tensors[1:], **options, reduction=reduction)

    for _ in range(2):
        loss(leaf)
        loss(tensors[0])
    seen = events(lambda: loss(leaf).sum().backward())
    assert seen.count(name) == 1
    assert f"{name}Backward" in seen
    with torch.no_grad():
        assert events(lambda: loss(leaf)).count(name) == 1
    assert events(lambda: loss(tensors[0])).count(name) == 1
    memo.known.clear()
    assert events(lambda: loss(tensors[0])).count(name) == 1
    with trace.forced("the test asks for it"):
        assert events(lambda: loss(tensors[0])).count(name) == 1


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_names_the_loss() -> None:
    for _ in range(3):
        x = torch.tensor([[float("nan"), 0.0]], requires_grad=True)
        with (
            pytest.warns(UserWarning, match=r"Error detected in fusedloss::cross_entropyBackward"),
            pytest.raises(RuntimeError, match=r"fusedloss::cross_entropyBackward.* nan"),
            torch.autograd.detect_anomaly(check_nan=True),
        ):
            functional.cross_entropy(x, torch.tensor([0])).backward()


# The level of checks


def test_checks_of_threads_that_overlap() -> None:
    p = torch.tensor([[0.25, 0.75]]).repeat(8, 1)
    entered, left = threading.Event(), threading.Event()
    seen: list[object] = []

    def refused() -> bool:
        try:
            functional.kl_div(p, p, reduction="sum")
        except ValueError:
            return True
        return False

    def other() -> None:
        seen.append(refused())
        with fusedloss.checks("strict"):
            entered.set()
            left.wait(10)
            seen.append(refused())
        seen.append(refused())

    thread = threading.Thread(target=other)
    with fusedloss.checks("strict"):
        thread.start()
        assert entered.wait(10)
    assert not refused()
    left.set()
    thread.join()
    assert seen == [False, True, False]
    assert not refused()


def test_checks_are_restored_exactly() -> None:
    from fusedloss.core.levels import level

    guard = fusedloss.checks("strict")  # from now on
    try:
        assert level() == 2
        with guard:
            assert level() == 2
            with fusedloss.checks("default"), guard:
                assert level() == 2
            assert level() == 2
        assert level() == 0
        with guard, pytest.raises(KeyError), fusedloss.checks("eager"):
            assert level() == 1
            raise KeyError
        assert level() == 0
        inside: list[int] = []

        def other() -> None:
            with guard:
                inside.append(level())
            inside.append(level())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert inside == [2, 0]
    finally:
        fusedloss.checks("default")
