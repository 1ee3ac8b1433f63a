"""Losses x options x layouts x reductions x rows of each process, against one process."""

from __future__ import annotations

import pytest
from conftest import EVERY_CASE, Case

from distributed import matrix, ranks

EVERY = pytest.mark.parametrize("case", EVERY_CASE, ids=str)
LAYOUTS = pytest.mark.parametrize("layout", (*matrix.LAYOUTS, *matrix.LAYOUTS_2D))


def hold(cases: list[Case], layout: str, world: int) -> None:
    cells = [c for case in cases for c in matrix.cells(case.loss.key, case.option, layout, world)]
    for wrong in ranks.run(world, matrix.check_all, cells, limit=60 + 2 * len(cells)):
        assert not wrong, "\n".join(f"{cell}: {told}" for cell, told in wrong.items())


@pytest.mark.one_in(6)
@EVERY
@LAYOUTS
def test_two_processes(case: Case, layout: str) -> None:
    hold([case], layout, 2)


@pytest.mark.nightly
@LAYOUTS
@pytest.mark.parametrize("world", [3, 4])
def test_more_processes(layout: str, world: int) -> None:
    """All in one run: to start processes takes longer than a cell."""
    hold(EVERY_CASE, layout, world)
