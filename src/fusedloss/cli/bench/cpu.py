"""Times and memory of a loss on the CPU, taken in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .. import processes
from ..processes import Send, growth, reason, small_pages
from .builds import both_builds
from .cases import Case
from .harness import (
    Plan,
    Report,
    Result,
    Sampler,
    Work,
    begin,
    compare,
    interleave,
    prepared,
    unheard,
    wall,
)


def time_case(case: Case, plan: Plan, report: Report = unheard) -> Result:
    """Measures all variants of a case, a sample of each in turn."""
    torch.set_num_threads(plan.threads)
    report("inputs", 0.0)
    work = plan.work(case)
    result = begin(work)
    result.yardstick = work.yardstick
    variants = list(plan.variants)
    if "yardstick" in variants:
        variants.append("held")
    if case.against_plain:
        variants.append("plain")
    steps = prepared(work, variants, result, report)
    samplers: dict[str, Sampler] = {k: partial(wall, s, clock=plan.clock) for k, s in steps.items()}
    if plan.against:
        report("builds", 0.0)
        builds, result.as_built = both_builds(work, plan)
        samplers |= builds
    result.samples, result.calls = interleave(samplers, plan, report)
    report("comparing", 1.0)
    if work.checked:
        check(work, result)
    return result


def check(work: Work, result: Result) -> None:
    """Whether ours gives the same bits on any number of threads, and what eager gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = work.outcome(work.case.row.function)
    torch.set_num_threads(max(threads, 2))
    many = work.outcome(work.case.row.function)
    torch.set_num_threads(threads)
    result.same_bits = all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, many, strict=True)
    )
    del many
    if "eager" in result.samples:
        compare(work, one, result)


def peak_memory(case: Case, variant: str, plan: Plan) -> int:
    """The most resident memory of one call, in bytes beyond what is resident before it."""
    torch.set_num_threads(plan.threads)
    small_pages()
    torch.ones(1 << 20).exp_()  # starts the threads
    few = replace(case, shape=tuple(min(n, 128) for n in case.shape), against_plain=None)
    plan.work(few).step(variant)()
    step = plan.work(case).step(variant)
    if variant == "compile":
        step()
    return growth(step)


def needed(case: Case, plan: Plan) -> float:
    """A generous estimate of the bytes that a case takes: examples are drawn in float64."""
    itemsize = getattr(torch, case.dtype).itemsize
    return case.numel * (3 * 8 + (32 if plan.against else 16) * itemsize)


@dataclass(frozen=True)
class Job:
    """Cases to time in one process, or one case whose `memory` to take for one variant."""

    cases: tuple[Case, ...]
    plan: Plan
    memory: str | None = None


Event = tuple[str, int, Any]


def work_on(send: Send, job: Job) -> None:
    """The body of a process: sends ("progress", case, (phase, done)) and ("result", case, it)."""
    for index, case in enumerate(job.cases):
        last = 0.0

        def report(phase: str, done: float, index: int = index) -> None:
            nonlocal last
            if time.perf_counter() - last > 0.4 or phase != "sampling":
                last = time.perf_counter()
                send(("progress", index, (phase, done)))

        outcome: Result | int | str
        try:
            if job.memory:
                report(f"memory of {job.memory}", 0.0)
                outcome = peak_memory(case, job.memory, job.plan)
            else:
                outcome = time_case(case, job.plan, report)
        except Exception as error:
            outcome = reason(error)
        send(("result", index, outcome))


def stream(job: Job) -> Iterator[Event]:
    """Runs a job and yields its events; a process that dies gives its reason as the result."""
    done = 0
    try:
        for event in processes.stream(work_on, job):
            done += event[0] == "result"
            yield event
    except RuntimeError as error:
        yield from (("result", k, str(error)) for k in range(done, len(job.cases)))


def jobs(cases: Sequence[Case], plan: Plan) -> list[Job]:
    """A process for each case; small ones, which leave the allocator as it is, share one."""
    found: list[Job] = []
    shared: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        if case.group == "sweep" and case.numel < 1 << 20:
            shared.setdefault((case.loss, case.dtype), []).append(case)
        else:
            found.append(Job((case,), plan))
    return found + [Job(tuple(each), plan) for each in shared.values()]
