"""The harness: what processes return, and that no fault of one is overlooked."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import ranks


def added(rank: int, number: int) -> Any:
    total = torch.tensor(float(rank + number))
    dist.all_reduce(total)
    return rank, total.item(), torch.get_num_threads()


def raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("of rank 1")
    dist.barrier()


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def hangs(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


@pytest.mark.slow
def test_each_rank_returns_what_its_function_does() -> None:
    assert ranks.run(2, added, 5) == [(0, 11.0, 1), (1, 11.0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "words"),
    [(raises, "of rank 1"), (dies, "rank 1: died"), (hangs, "rank 1: was not done in time")],
)
def test_a_fault_of_one_is_one_of_all(function: Any, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(ranks.Failed, match=words):
        ranks.run(2, function, limit=4 if function is hangs else ranks.LIMIT)
    assert time.monotonic() - start < 30
