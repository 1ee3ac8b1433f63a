"""Bits of heads: the same whatever the threads and the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HALVES, name_of, same_bits
from problems import Distillation, Problem, Results
from torch import Generator

from fusedloss import linear_cross_entropy, linear_kl_div, linear_log_prob


def with_threads(compute: Callable[[], Results]) -> list[Results]:
    before = torch.get_num_threads()
    try:
        return [(torch.set_num_threads(n), compute())[1] for n in (1, 2)]
    finally:
        torch.set_num_threads(before)


def assert_same_bits(found: list[Results]) -> None:
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=name_of)
@pytest.mark.parametrize(("setting", "reduction"), [("plain", "none"), ("all", "mean")])
def test_threads_change_nothing_but_matrix_products(
    dtype: torch.dtype, setting: str, reduction: str, generator: Generator
) -> None:
    """Here the products are of one term each, and the same in whatever order they are summed."""
    size = 256
    problem = Distillation(generator, dtype, shape=(size, size, size))
    for name in ("input", "linear_weight"):
        order = torch.randperm(size, generator=generator)
        problem.tensors[name] = torch.eye(size, dtype=dtype)[order] * 2
    settings = {**problem.settings(setting), "reduction": reduction}
    logits = {"teacher_logits": problem.normal(size, size)}
    calls: list[Callable[..., Any]] = [
        lambda **t: linear_cross_entropy(**t, **settings),
        lambda **t: linear_kl_div(**t, **logits, hard_weight=0.5, reduction=reduction),
        lambda **t: linear_log_prob(**t, statistics=setting == "all"),
    ]
    for call in calls:
        assert_same_bits(with_threads(lambda call=call: problem.run(call)))  # type: ignore[misc]


def test_threads_share_no_sum_over_rows(generator: Generator) -> None:
    """torch's own sum of so many depends on how many threads share it."""
    problem = Problem(generator, shape=(70_001, 1, 3))
    settings = {"weight": problem.normal(3).abs(), "sample_weight": problem.rewards()}
    for reduction in ("sum", "mean"):
        assert_same_bits(
            with_threads(
                lambda r=reduction: [  # type: ignore[misc]
                    linear_cross_entropy(**problem.tensors, **settings, reduction=r)
                ]
            )
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=name_of)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, generator: Generator) -> None:
    """But for its products, which are of one term here."""
    problem = Distillation(generator, dtype, shape=(67, 67, 67))
    problem.tensors["input"] = torch.eye(67, dtype=dtype)[torch.randperm(67, generator=generator)]
    problem.tensors["linear_weight"] = torch.eye(67, dtype=dtype) / 4
    given: dict[str, Any] = {**problem.tensors, "teacher_logits": problem.normal(67, 67)}

    def losses(rows: slice) -> Results:
        each = {k: t[rows] if k in of_rows else t for k, t in given.items()}
        teacher = each.pop("teacher_logits")
        found = [linear_cross_entropy(**each, reduction="none", label_smoothing=0.1, softcap=3.0)]
        found.append(linear_kl_div(**each, teacher_logits=teacher, reduction="none"))
        return [*found, *linear_log_prob(**each, statistics=True)[:4]]

    of_rows = ("input", "target", "teacher_logits")
    whole = losses(slice(None))
    for rows in (slice(0, 1), slice(33, 34), slice(5, 44), slice(1, None, 3)):
        assert all(same_bits(a, b[rows]) for a, b in zip(losses(rows), whole, strict=True))
