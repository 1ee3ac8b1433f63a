"""`fusedloss.patch()` under interrupts, threads and reloads: all is patched or nothing."""

from __future__ import annotations

import dis
import importlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from patching import _restored, counted, example, in_place, module  # noqa: F401
from torch import Generator

# Bound before any patch, as in a library that was imported earlier.
from torch.nn.functional import cross_entropy

import fusedloss


def interrupted(function: Callable[[], None], step: int) -> bool:
    """Runs with a KeyboardInterrupt at the step-th place in patch.py where Python looks for signals.

    Whether there was such a place.
    """
    count, previous = 0, {}

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        code = frame.f_code
        if code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            done = previous.get(frame, "RESUME")
            previous[frame] = dis.opname[code.co_code[frame.f_lasti]]
            # After a call, a jump back and at the start: between others a lock could be taken for good.
            count += done.startswith(("CALL", "JUMP_BACKWARD", "RESUME"))
            if count >= step:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def a_block() -> None:
    with fusedloss.patched():
        pass


@pytest.mark.parametrize("function", [fusedloss.patch, fusedloss.unpatch, a_block])
def test_an_interrupt_leaves_what_unpatch_mends(function: Callable[[], None]) -> None:
    before = {n: (f.__code__, dict(vars(f))) for n, f in module.FUNCTIONS.items()}
    fusedloss.patch()  # the redirections are made
    step = 0
    came = True
    while came:
        (fusedloss.patch if function is fusedloss.unpatch else fusedloss.unpatch)()
        step += 1
        came = interrupted(function, step)
        assert not module._lock._is_owned(), step
        if function is fusedloss.patch:
            assert len(in_place()) == 1, step  # all or nothing
        fusedloss.unpatch()
        assert in_place() == {False}, step
        assert {n: (f.__code__, dict(vars(f))) for n, f in module.FUNCTIONS.items()} == before
        with fusedloss.patched():
            assert in_place() == {True}, step
        assert in_place() == {False}, step
    assert step > 30


def test_to_patch_again_and_be_interrupted_changes_nothing() -> None:
    fusedloss.patch()
    step, came = 0, True
    while came:
        step += 1
        came = interrupted(fusedloss.patch, step)
        assert in_place() == {True}, step
    fusedloss.unpatch()
    assert in_place() == {False}


def test_a_block_ends_with_the_last_that_overlaps() -> None:
    """As two threads' do."""
    blocks = [fusedloss.patched() for _ in range(2)]
    for block in blocks:
        block.__enter__()
    assert in_place() == {True}
    for block, after in zip(blocks, (True, False), strict=True):
        block.__exit__(None, None, None)
        assert in_place() == {after}
    with fusedloss.patched():
        fusedloss.patch()
    assert in_place() == {True}


def test_threads_patch_and_call_at_once(generator: Generator) -> None:
    x, target = example(generator)
    expected = cross_entropy(x, target).item()
    failures: list[str] = []
    before = sys.getswitchinterval()

    def work(which: int) -> None:
        try:
            for _ in range(100):
                if which == 0:
                    fusedloss.patch()
                    fusedloss.unpatch()
                elif which == 1:
                    with fusedloss.patched():
                        pass
                assert abs(cross_entropy(x, target).item() - expected) < 1e-5
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures
    fusedloss.unpatch()
    assert in_place() == {False}


def test_a_reload_keeps_the_patch(generator: Generator) -> None:
    x, target = example(generator)
    code = cross_entropy.__code__
    for patched in (True, False):
        if patched:
            fusedloss.patch()
        importlib.reload(module)
        assert in_place() == {patched}
        assert bool(counted(lambda: cross_entropy(x, target))[1]) is patched
        fusedloss.unpatch()
        assert cross_entropy.__code__ is code
