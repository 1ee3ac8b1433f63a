"""A denominator of DTensors' losses, and a DTensor as one."""

from __future__ import annotations

import pytest

from distributed import divided, ranks


@pytest.mark.parametrize("layout", divided.LAYOUTS)
def test_every_loss(layout: str) -> None:
    for wrong in ranks.run(2, divided.check_all, layout):
        assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [*divided.LAYOUTS, "rows alike", "rows classes"])
def test_every_loss_of_four_processes(layout: str) -> None:
    for wrong in ranks.run(4, divided.check_all, layout):
        assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())


def test_beside_plain_tensors() -> None:
    for found in ranks.run(2, divided.beside_plain_tensors):
        values = [v for name in ("number", "tensor", "alike", "integer alike") for v in found[name]]
        assert values[2:] == values[:2] * 3
        for words in found["pending"]:
            assert "denominator is a DTensor with placements (Partial(sum),) beside plain" in words


def test_counted_targets() -> None:
    assert max(map(abs, ranks.run(2, divided.counted))) < 1e-14


def test_class_groups() -> None:
    for apart in ranks.run(2, divided.of_shards_of_classes):
        assert max(map(abs, apart)) < 1e-14
