"""Which paths calls have taken: the tally of all, and the record that `explain` reads."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Route(NamedTuple):
    """The path that a call took: `kernel` is None where the formula ran."""

    loss: str
    kernel: str | None
    why: str
    device: str = "CPU"

    def __str__(self) -> str:
        path = (
            f"{self.device} kernel {self.kernel}" if self.kernel else "formula (torch operations)"
        )
        return f"{self.loss}: {path}, because {self.why}"


# By loss: a Counter, or keys of two words, would take twice the time.
by_kernel: defaultdict[str, int] = defaultdict(int)
by_formula: defaultdict[str, int] = defaultdict(int)
_routes: list[Route] | None = None
force: str | None = None  # why every call takes the formula
watched = (
    False  # whether each call must find its path anew: it is forced, or `explain` wants to know
)


def _watch() -> None:
    global watched
    watched = force is not None or _routes is not None


@contextlib.contextmanager
def forced(why: str) -> Iterator[None]:
    """Inside, every call takes the formula, for the reason `why`."""
    global force
    before, force = force, why
    _watch()
    try:
        yield
    finally:
        force = before
        _watch()


def calls() -> Counter[tuple[str, str]]:
    """How many calls each (loss, "kernel" or "formula") has had so far."""
    paths = {"kernel": by_kernel, "formula": by_formula}
    return Counter({(loss, path): n for path, by in paths.items() for loss, n in by.items()})


def note(
    loss: str, kernel: str | None, why: str, device: str = "CPU", counted: bool = False
) -> None:
    """Counts a call, unless its operator does, and tells `explain` of it."""
    if not counted:
        (by_kernel if kernel else by_formula)[loss] += 1
    if _routes is not None:
        _routes.append(Route(loss, kernel, why, device))


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Route:
    """The path that `function(*args, **kwargs)` takes, and why.

    `function` is a loss function or module; the call is made and its result dropped.

    Raises:
        ValueError: the call reached no loss of this library.
    """
    global _routes
    outer, _routes = _routes, []
    _watch()
    try:
        function(*args, **kwargs)
        routes = _routes
    finally:
        _routes = outer
        _watch()
    if not routes:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"explain: {name} called no loss of fusedloss")
    return routes[-1]
