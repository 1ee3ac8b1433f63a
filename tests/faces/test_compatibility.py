"""docs/compatibility.md: the table is that of the records, and each deviation exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import deviations_of_rows  # noqa: F401
import deviations_of_sequences  # noqa: F401
import deviations_of_shards  # noqa: F401
import deviations_of_use  # noqa: F401
import pytest
import torch
from deviations import deviations
from records import LOSSES, counts
from records_summary import page_table

import fusedloss as ours
from fusedloss.front.loss import FUNCTIONS
from fusedloss.front.modules import MODULES

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"


@pytest.mark.parametrize("title", deviations)
def test_deviation_exists(title: str) -> None:
    deviations[title]()


def test_page_lists_the_deviations() -> None:
    section = PAGE.read_text().split("## Deviations")[1].split("\n## ")[0]
    head, *listed = re.findall(r"^\| (.+?) \| .+ \|$", section, re.MULTILINE)
    assert head == "what"
    assert sorted(listed) == sorted(deviations)


def test_page_counts_the_records() -> None:
    version = re.search(r"records .*\(torch ([\d.]+),", PAGE.read_text())
    assert version
    if not torch.__version__.startswith(f"{version[1]}."):
        pytest.skip(f"the page counts those of torch {version[1]}, this is {torch.__version__}")
    assert page_table(counts()) in PAGE.read_text(), "make it anew: pytest --write-records"


def test_modules_and_functions_are_all_there() -> None:
    for function, module in LOSSES.items():
        assert issubclass(getattr(ours.nn, module), getattr(torch.nn, module))
        assert callable(getattr(ours.functional, function))


def test_every_loss_of_torch_is_there() -> None:
    """But for a name of NLLLoss that has been deprecated since torch 0.2."""
    modules = {*torch.nn.modules.loss.__all__, "AdaptiveLogSoftmaxWithLoss"} - {"NLLLoss2d"}
    assert modules <= MODULES.keys()
    home = torch.nn.functional
    functions = {
        name
        for name, found in vars(home).items()
        if inspect.isfunction(found)
        and found.__module__ == home.__name__
        and "reduction" in inspect.signature(found).parameters
    }
    assert len(functions) > 20 and functions <= FUNCTIONS.keys()
