"""The suite sees the errors of mutation.py."""

from __future__ import annotations

import mutation
import pytest
from mutation import MUTANTS, SAMPLE, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_still_applies(mutant: Mutant) -> None:
    assert mutant.occurrences() == 1


def test_enough() -> None:
    assert len(set(MUTANTS)) == len(MUTANTS) >= 30
    assert sum(m.builds for m in MUTANTS) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("mutant", SAMPLE, ids=str)
def test_sample_is_seen(mutant: Mutant) -> None:
    assert mutant.fails()


@pytest.mark.slow
def test_unchanged_copy_passes() -> None:
    first = SAMPLE[0]
    assert not Mutant(first.file, first.old, first.old, first.tests).fails()


@pytest.mark.nightly
def test_all_are_seen() -> None:
    assert not mutation.survivors(MUTANTS)
