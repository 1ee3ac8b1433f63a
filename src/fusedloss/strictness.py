"""How much a call is checked beyond what PyTorch checks: `fusedloss.checks`."""

from __future__ import annotations

from types import TracebackType

from .errors import fail

LEVELS = ("default", "eager", "strict")
EAGER, STRICT = 1, 2
_level = 0


class checks:  # noqa: N801
    """Sets how much every call of this process is checked, from now on or within a `with`.

    'default' is what PyTorch checks; on a GPU, a class index out of range is raised at the next call,
    since to look at once would stop the queue. 'eager' looks at once. 'strict' also refuses, with a
    ValueError, what PyTorch lets pass and users rue: docs/compatibility.md lists it.

        fusedloss.checks("strict")
        with fusedloss.checks("eager"):
            loss = criterion(logits, target)

    Raises:
        ValueError: an unknown level.
    """

    def __init__(self, level: str) -> None:
        global _level
        if level not in LEVELS:
            expected = ", ".join(map(repr, LEVELS))
            fail(ValueError, "checks", f"level must be one of {expected}, got {level!r}")
        self._before = _level
        _level = LEVELS.index(level)

    def __enter__(self) -> checks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _level
        _level = self._before


def eager() -> bool:
    """Whether an error must be raised by the call that makes it."""
    return _level >= EAGER


def strict() -> bool:
    """Whether to refuse what PyTorch lets pass and users rue."""
    return _level >= STRICT
