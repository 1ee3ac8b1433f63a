"""DTensors in the ways that losses are called."""

from __future__ import annotations

import traceback

import pytest

from distributed import means, ranks, uses


def tried(rank: int, module: str) -> tuple[list[str], dict[str, str]]:
    """The names of its checks, and what went wrong in which."""
    named, wrong = {"means": means, "uses": uses}[module].checks(), {}
    for name, check in named.items():
        try:
            check()
        except Exception:
            wrong[name] = traceback.format_exc()
    return list(named), wrong


@pytest.mark.slow
@pytest.mark.parametrize("module", ["means", "uses"])
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_dtensors(module: str, world: int) -> None:
    for names, wrong in ranks.run(world, tried, module):
        assert len(names) > 50
        assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


def compiled(rank: int, backend: str, every: bool) -> None:
    uses.compiled(backend, every)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "every"),
    [
        pytest.param("aot_eager", False, id="aot_eager"),
        pytest.param("inductor", True, id="inductor", marks=pytest.mark.nightly),
    ],
)
def test_compiled(backend: str, every: bool) -> None:
    ranks.run(2, compiled, backend, every)
