"""Functions on several processes, which talk over the loopback: `run`.

The processes are forked from one that has imported torch and this library, and little else. Who dies,
raises, or is not done in time is a failure, and ends the others.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT = 20.0  # seconds that a process waits for the others
LIMIT = 120.0  # seconds of a run in all
PRELOADED = [
    "torch",
    "torch._dynamo",  # which the first operation of a DTensor imports
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "fusedloss",
    "fusedloss.lazy",
    "fusedloss.route.dispatch",
]


class Failed(AssertionError):
    """What became of each process, where not all returned."""


def run(
    world: int, function: Callable[..., Any], *arguments: Any, limit: float = LIMIT
) -> list[Any]:
    """What `function(rank, *arguments)` returns on each of `world` processes, by rank.

    The function is one of a module, the arguments and what it returns can be pickled. A default process group
    is there, of gloo; `torch.distributed` knows the rest. One thread a process.

    Raises:
        Failed: a process raised, died, or was not done in time; with all tracebacks.
    """
    server = multiprocessing.get_context(os.environ.get("FUSEDLOSS_TEST_START", "forkserver"))
    server.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes, ends = [], []
        for rank in range(world):
            ours, theirs = server.Pipe(duplex=False)
            given = (theirs, rank, world, f"{folder}/store", function, arguments)
            process = server.Process(target=_rank, args=given, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        try:
            told = _told(ends, time.monotonic() + limit)
        finally:
            for process, end in zip(processes, ends, strict=True):
                process.kill()
                process.join()
                end.close()
    wrong = [f"rank {k}: {t}" for k, (good, t) in enumerate(told) if not good]
    if wrong:
        raise Failed("\n".join(wrong))
    return [value for _, value in told]


def _told(ends: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
    """Of each process whether it returned, and what; after a failure the others have a moment for theirs."""
    told: dict[Connection, tuple[bool, Any]] = {}
    while len(told) < len(ends):
        ready = wait(
            [end for end in ends if end not in told], max(0.0, deadline - time.monotonic())
        )
        for end in ready:
            assert isinstance(end, Connection)
            try:
                told[end] = end.recv()
            except EOFError:
                told[end] = False, "died"
            if not told[end][0]:
                deadline = min(deadline, time.monotonic() + 2)
        if not ready:
            break
    return [told.get(end, (False, "was not done in time")) for end in ends]


def _rank(
    end: Connection,
    rank: int,
    world: int,
    store: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT),
        )
        told = True, function(rank, *arguments)
        dist.barrier()  # else who is done first cuts the others off
    except BaseException:
        told = False, traceback.format_exc()
    end.send(told)
    end.close()
    os._exit(0)
