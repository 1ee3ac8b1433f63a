"""The second call of a kind takes the short way: no check runs again, and no argument is packed anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import (
    CASES,
    FLOATS,
    OVERLAPS,
    Case,
    Tensors,
    name_of,
    no_head,
    run,
)
from torch import Generator

from fusedloss.core import trace
from fusedloss.engines import cpu
from fusedloss.front.definition import REGISTRY
from fusedloss.route import dispatch, memo

EVERY = [case for case in (*CASES, *OVERLAPS) if no_head(case)]
EXTENDED = [
    Case(loss, option)
    for loss in REGISTRY.values()
    for option in loss.extensions
    if loss.kind != "heads"
]
each_case = pytest.mark.parametrize("case", EVERY, ids=str)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=name_of)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    memo.known.clear()
    yield
    memo.known.clear()


def packed_anew(case: Case) -> bool:
    """How long sequences are, and where their labels begin, are values, which no plan keeps."""
    return case.kind == "sequences"


def takes_the_short_way(
    monkeypatch: pytest.MonkeyPatch, case: Case, step: Callable[[], object]
) -> None:
    """The third time: the first two make what is known, and its plans."""
    step(), step()
    before = trace.calls()[case.loss.name, "kernel"]
    with monkeypatch.context() as watched:
        watched.setattr(dispatch, "formula_reason", lambda *_: pytest.fail("checked again"))
        if not packed_anew(case):
            for engine in cpu.ENGINES.values():
                watched.setattr(engine, "pack", lambda *_: pytest.fail("packed anew"))
        step()
    assert trace.calls()[case.loss.name, "kernel"] == before + 1


def shape_of(case: Case) -> tuple[int, ...]:
    return (4, 6, 3)[: case.loss.dims]


def dense(tensors: Tensors) -> Tensors:
    return tensors


def spread(tensors: Tensors) -> Tensors:
    """With the second dimension innermost, as in channels last or a transposed matrix."""
    return tuple(
        t.transpose(1, -1).contiguous().transpose(1, -1)
        if t.dim() > 2
        else t.t().contiguous().t()
        if t.dim() == 2
        else t
        for t in tensors
    )


@pytest.mark.parametrize("layout", [dense, spread])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@each_float
@each_case
def test_of_every_option_set(
    case: Case,
    dtype: torch.dtype,
    reduction: str,
    layout: Callable[[Tensors], Tensors],
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reduction not in case.reductions:
        return
    tensors, options = case.example(shape_of(case), dtype, generator)
    given, options = layout(tensors), {**options, "reduction": reduction}
    for wanted in ((), case.loss.differentiable, case.loss.differentiable[-1:]):
        takes_the_short_way(
            monkeypatch,
            case,
            lambda: run(case.loss.function, given, options, wanted),  # noqa: B023
        )
