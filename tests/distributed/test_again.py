"""Calls of DTensors like earlier ones."""

from __future__ import annotations

from conftest import tells_what_changed

from distributed import again, ranks


def test_every_loss_takes_the_short_way() -> None:
    """With one gather where a loss is reduced or labels may be wrong, and none in backward."""
    first, second = ranks.run(2, again.every)
    assert first == second
    assert len(first) > 60
    for call, seen in first.items():
        assert len(seen) == (1 if "none" not in call else len(seen[:1])), f"{call}: {seen}"
        assert all(word.startswith("gather of") for word in seen), f"{call}: {seen}"


def test_derivatives() -> None:
    ranks.run(2, again.derivatives)


def test_means_over_denominators() -> None:
    ranks.run(2, again.over)


@tells_what_changed
def test_tensors_that_change() -> None:
    for found in ranks.run(2, again.changed):
        for words in found:
            assert "input was changed after the loss was taken" in words


def test_errors() -> None:
    """The same words after calls that were right, on every process."""
    first, second = ranks.run(2, again.wrong)
    assert first == second
    for before, after in first:
        assert before == after


def test_other_tensors() -> None:
    ranks.run(2, again.others)


def test_nothing_is_kept() -> None:
    assert ranks.run(2, again.kept) == [0, 0]
