"""Errors on all processes or on none, and as many collectives as one."""

from __future__ import annotations

from itertools import pairwise

import pytest

from distributed import faults, ranks
from fusedloss.front.definition import REGISTRY, Loss

OF_LABELS = [
    pytest.param(loss, reduction, id=f"{key}-{reduction}")
    for key, loss in REGISTRY.items()
    if loss.indices is not None and loss.kind != "sequences"
    for reduction in loss.reductions or ("none",)
]


# Whose tensors come whole to every process.
WHOLE = ("dice_cross_entropy, mean", "dice_focal, mean", "ctc_loss[in one row]")


@pytest.mark.parametrize(("loss", "reduction"), OF_LABELS)
def test_a_label_out_of_range_on_one_process(loss: Loss, reduction: str) -> None:
    for expected, said in ranks.run(2, faults.labels, loss.key, reduction):
        assert said.replace("linear_", "") == expected.replace("linear_", "")


def test_mixtures() -> None:
    first, second = ranks.run(2, faults.mixtures)
    words = (
        "target is a plain tensor beside the DTensor input on",
        "input is a plain tensor beside the DTensor target on",
        "target is a plain tensor beside the DTensor input on",
        "target is a plain tensor beside the DTensor input, and counts as held in full",
        "target is a DTensor on",
        "linear_weight is a DTensor, input is not",
        "between 0 and 1, but input[3, 0]",
        "between 0 and 1, but input[4, 2] = 1.5",
    )
    for own, others, expected in zip(first, second, words, strict=True):
        assert own == others
        assert expected in own


def test_another_error_of_one_process() -> None:
    first, second = ranks.run(2, faults.one_fails)
    assert "another process raised" in first
    assert "no memory" in second


def test_collectives() -> None:
    """The same on every process, whoever learns; one a loss that is reduced, or whose labels may be wrong."""
    first, second = ranks.run(2, faults.sequence)
    assert first == second
    for call, seen in first.items():
        if call.startswith(WHOLE):
            continue
        assert len(seen) <= 1, f"{call}: {seen}"
        assert seen or "none" in call, call


def test_kernels() -> None:
    for found in ranks.run(2, faults.kernels):
        assert all(found.values()), found


def test_bits() -> None:
    for a, b in pairwise(ranks.run(2, faults.same_bits)):
        assert a == b
