"""How much a call is checked beyond what PyTorch checks: `fusedloss.checks`."""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType

from .errors import fail
from .torch_state import constant

LEVELS = ("default", "eager", "strict")
EAGER, STRICT = 1, 2
_level: ContextVar[int] = ContextVar("fusedloss.checks", default=0)
_outer: ContextVar[tuple[int, ...]] = ContextVar("fusedloss.checks.outer", default=())
_made: ContextVar[checks | None] = ContextVar("fusedloss.checks.made", default=None)
level = _level.get


class checks:  # noqa: N801
    """Sets how much every call of this thread is checked, from now on or within a `with`.

    'default' is what PyTorch checks; on a GPU, a class index out of range is raised at the next call,
    since to look at once would stop the queue. 'eager' looks at once. 'strict' also refuses, with a
    ValueError, what PyTorch lets pass and users rue: docs/compatibility.md lists it::

        fusedloss.checks("strict")
        with fusedloss.checks("eager"):
            loss = criterion(logits, target)

    It holds for the thread or asyncio task that sets it (it is a context variable), as
    `torch.set_grad_enabled` does: each thread sets its own.

    Raises:
        ValueError: an unknown level.
    """

    def __init__(self, level: str) -> None:
        if level not in LEVELS:
            expected = ", ".join(map(repr, LEVELS))
            fail(ValueError, "checks", f"level must be one of {expected}, got {level!r}")
        self._own = LEVELS.index(level)
        self._before = _level.get()
        _level.set(self._own)
        _made.set(self)

    def __enter__(self) -> checks:
        # What it replaced when it was made, unless another thread made it, or it was entered before.
        before = self._before if _made.get() is self else _level.get()
        _made.set(None)
        _outer.set((*_outer.get(), before))
        _level.set(self._own)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if outer := _outer.get():  # not where another thread leaves what this one entered
            _outer.set(outer[:-1])
            _level.set(outer[-1])


@constant  # dynamo reads no context variable
def eager() -> bool:
    """Whether an error must be raised by the call that makes it."""
    return _level.get() >= EAGER


@constant
def strict() -> bool:
    """Whether to refuse what PyTorch lets pass and users rue."""
    return _level.get() >= STRICT
