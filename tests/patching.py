"""What the tests of `fusedloss.patch()` share."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Generator, Tensor

# Bound before any patch, as in a library that was imported earlier.
import fusedloss
from fusedloss.core import caches, trace

module = sys.modules["fusedloss.patch"]  # whose name is the function's, too


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    fusedloss.unpatch()


def counted(function: Callable[[], Any]) -> tuple[Any, Counter[tuple[str, str]]]:
    """The result, and the calls of our losses that it took."""
    before = trace.calls()
    result = function()
    return result, trace.calls() - before


def example(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 5, generator=generator), torch.tensor([0, 4, 2])


def in_place() -> set[bool]:
    """Of each function, of the name that patched code looks up and of torch's caches: whether patched."""
    codes = {f.__code__ is not module.ORIGINALS[n].__code__ for n, f in module.FUNCTIONS.items()}
    doors = {"__prepare_scriptable__" in vars(f) for f in module.FUNCTIONS.values()}
    marked = caches.own() in torch.compiler.config.cache_key_tag
    return {*codes, *doors, hasattr(F, module.NAME), marked}
