"""Work in processes of its own, and the memory that a call takes there.

A fork server that has imported torch, and has never run it, starts each process: none sees the
allocator or the threads of another.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

Send = Callable[[Any], None]
T = TypeVar("T")

MEBI = 1 << 20
NO_COMPILER = "torch.compile found no C++ compiler (set CXX)"


def stream(body: Callable[..., None], *args: Any) -> Iterator[Any]:
    """What `body(send, *args)` sends from its process. RuntimeError where that dies."""
    method = "forkserver"
    if method not in multiprocessing.get_all_start_methods():
        method = "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([f"{__package__}.bench.cpu"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_enter, args=(theirs, body, args), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            try:
                message = ours.recv()
            except EOFError:
                break
            yield message
        process.join()
        if process.exitcode:
            why = " (out of memory?)" * (process.exitcode == -signal.SIGKILL)
            raise RuntimeError(f"its process ended with exit code {process.exitcode}{why}")
    finally:
        process.kill()
        process.join()
        ours.close()


def _enter(pipe: Connection, body: Callable[..., None], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    warnings.simplefilter("ignore")
    body(pipe.send, *args)
    pipe.close()


def in_a_process(function: Callable[..., T], *args: Any) -> T:
    """What the function returns in a process of its own. RuntimeError where that fails."""
    ((error, answer),) = stream(_answer, function, args)
    if error:
        raise RuntimeError(error)
    result: T = answer
    return result


def _answer(send: Send, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        send((None, function(*args)))
    except Exception as error:
        send((reason(error), None))


def reason(error: BaseException) -> str:
    """The first line of what went wrong; of torch.compile's, the cause of all."""
    chain = [error]
    while (cause := chain[-1].__cause__ or getattr(chain[-1], "inner_exception", None)) is not None:
        if cause in chain:
            break
        chain.append(cause)
    if any(type(each).__name__ == "InvalidCxxCompiler" for each in chain):
        return NO_COMPILER
    last = chain[-1]
    line = next((line for line in str(last).splitlines() if line.strip()), "")
    return f"{type(last).__name__}: {line}"[:200]


def small_pages() -> None:
    """Huge pages round up by up to 2 MiB a tensor, which is no one's demand."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE


def growth(step: Callable[[], object]) -> int:
    """The most resident memory of the call, in bytes beyond what is resident before it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def available() -> float:
    """Bytes of memory that can be had, or infinity where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
    return math.inf
