"""Times and memory of a loss, taken in processes of their own.

A fork server that has imported torch, and has never run it, starts each process: no case sees the
allocator or the threads of another.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import itertools
import math
import multiprocessing
import random
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...front.definition import REGISTRY
from .cases import Case, learned, yardstick

Step = Callable[[], None]
Report = Callable[[str, float], None]

MEGA = 1e6
WARM_UP = 3
WIDEST_ERROR = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.01, "float16": 0.002}


@dataclass(frozen=True)
class Plan:
    """How to measure: which variants, on how many threads, and how long."""

    variants: tuple[str, ...]
    threads: int
    seconds: float  # of sampling a case, or a little more where the fewest rounds take longer
    sample: float  # the shortest sample in seconds; fast calls are repeated to fill it
    fewest: int
    most: int = 60


@dataclass
class Result:
    """What was measured of a case. A sample is the mean time of one call, in seconds."""

    case: Case
    samples: dict[str, list[float]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)  # in each sample
    skipped: dict[str, str] = field(default_factory=dict)  # variant: reason
    peaks: dict[str, int] = field(default_factory=dict)  # bytes beyond the inputs
    yardstick: str = ""
    input_bytes: int = 0
    gradient_bytes: int = 0
    same_bits: bool | None = None  # on 1 thread and on more
    difference: float | None = None  # from eager, relative to the largest entry
    wrong: bool = False  # a difference that rounding does not explain

    def quartiles(self, variant: str) -> tuple[float, float, float] | None:
        samples = self.samples.get(variant)
        if not samples:
            return None
        if len(samples) == 1:
            return (samples[0],) * 3
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return low, median, high

    def median(self, variant: str) -> float | None:
        quartiles = self.quartiles(variant)
        return quartiles and quartiles[1]

    def spread(self, variant: str) -> float | None:
        """The interquartile range over the median."""
        quartiles = self.quartiles(variant)
        return quartiles and (quartiles[2] - quartiles[0]) / quartiles[1]

    def ratio(self, variant: str, to: str) -> float | None:
        """The median over the rounds of one time over the other.

        Within a round both ran moments apart, so a machine that others slow down slows both.
        """
        pairs = list(zip(self.samples.get(variant, ()), self.samples.get(to, ()), strict=False))
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def excess(self, variant: str) -> float | None:
        """The peak beyond the inputs and the gradient, in MB."""
        peak = self.peaks.get(variant)
        # Of the gradient's own pages some may have been resident before.
        return None if peak is None else max(0, peak - self.gradient_bytes) / MEGA

    def to_json(self) -> dict[str, Any]:
        samples = {k: [float(f"{s:.5g}") for s in each] for k, each in self.samples.items()}
        case = {**asdict(self.case), "shape": list(self.case.shape)}
        return {**asdict(self), "case": case, "samples": samples}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Result:
        case = {**fields["case"], "shape": tuple(fields["case"]["shape"])}
        return Result(**{**fields, "case": Case(**case)})


class Workload:
    """The tensors of a case, and its variants as calls without arguments.

    A call runs forward, `backward()` and drops the gradient: what a training step does. `.grad` is
    None before, so that autograd takes the new gradient over as it is, and copies it only for a
    variant that cannot give it away. Memory is freed by the one who allocated it, on the clock.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        self._fill(case.row.example(case.shape, getattr(torch, case.dtype), generator))
        self.settings = case.settings(self.tensors, generator)

    def _fill(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors
        case = self.case
        self.leaves = [self.tensors[k].requires_grad_() for k in learned(case.row)]
        self.bare = tuple(t.detach() for t in self.tensors)

    def differentiate(self, function: Callable[..., Tensor]) -> Step:
        tensors, settings, leaves = self.tensors, self.settings, self.leaves

        def step() -> None:
            function(*tensors, **settings).backward()
            for leaf in leaves:
                leaf.grad = None

        return step

    def step(self, variant: str) -> Step:
        row = self.case.row
        if variant == "ours":
            return self.differentiate(row.function)
        if variant == "eager":
            return self.differentiate(row.torch_function)
        if variant == "compile":
            return self.differentiate(compiled(row.torch_function))
        if variant == "plain":
            assert self.case.against_plain is not None
            case = replace(self.case, loss=self.case.against_plain, option="")
            return Workload(case).differentiate(case.row.function)
        rod, bare = yardstick(row, self.bare), self.bare
        if variant == "yardstick":

            def fresh() -> None:
                rod.fresh(*bare)

            return fresh
        out = [torch.empty_like(leaf).detach() for leaf in self.leaves]

        def held() -> None:
            rod.held(out, *bare)

        return held

    def widened(self) -> Workload:
        """The same values in float32."""
        other = copy.copy(self)
        other._fill(tuple(map(_widened, self.bare)))
        other.settings = {name: _widened(value) for name, value in self.settings.items()}
        return other

    def outcome(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """The loss and its gradients."""
        loss = function(*self.tensors, **self.settings)
        loss.backward()
        grads = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        for leaf in self.leaves:
            leaf.grad = None
        return [loss.detach(), *grads]


def _widened(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().float() if floating else value


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    import torch._inductor.config

    # A pool of compilers would still be closing while the clock runs.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def time_case(case: Case, plan: Plan, report: Report) -> Result:
    """Measures all variants of a case, a sample of each in turn."""
    result = Result(case)
    report("inputs", 0.0)
    work = Workload(case)
    result.yardstick = yardstick(case.row, work.bare).label
    result.input_bytes = sum(t.nbytes for t in work.tensors)
    result.gradient_bytes = sum(t.nbytes for t in work.leaves)
    variants = list(plan.variants)
    if "yardstick" in variants:
        variants.append("held")
    if case.against_plain:
        variants.append("plain")
    steps: dict[str, Step] = {}
    for variant in variants:
        report("compiling" if variant == "compile" else "warming up", 0.0)
        try:
            step = work.step(variant)
            warm_up(step)
        except Exception as error:
            result.skipped[variant] = reason(error)
        else:
            steps[variant] = step
    result.samples, result.calls = interleave(steps, plan, report)
    report("comparing", 1.0)
    check(work, result)
    return result


def warm_up(step: Step) -> None:
    """A few calls, or one that takes long."""
    start = time.perf_counter()
    for _ in range(WARM_UP):
        step()
        if time.perf_counter() - start > 0.5:
            break


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


NO_COMPILER = "torch.compile found no C++ compiler (set CXX)"


def interleave(
    steps: dict[str, Step], plan: Plan, report: Report
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Rounds of one sample of each variant, in a new order each round."""
    calls = {name: fill(step, plan.sample) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, generator = list(steps), random.Random(0)
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for done in range(1, plan.most + 1):
        generator.shuffle(order)
        for name in order:
            samples[name].append(sample(steps[name], calls[name]))
        spent = time.perf_counter() - start
        report("sampling", min(max(done / plan.most, spent / max(plan.seconds, 1e-9)), 1.0))
        if done >= plan.fewest and spent >= plan.seconds:
            break
    gc.enable()
    return samples, calls


def fill(step: Step, seconds: float) -> int:
    """How many calls make a sample of this length: counted anew until they do."""
    calls = 1
    while (spent := calls * sample(step, calls)) < seconds:
        calls = max(calls + 1, min(10 * calls, math.ceil(1.2 * calls * seconds / spent)))
    return calls


def sample(step: Step, calls: int) -> float:
    step()  # finds caches and allocator as another variant left them
    repeat = itertools.repeat(None, calls)
    start = time.perf_counter()
    for _ in repeat:
        step()
    return (time.perf_counter() - start) / calls


def check(work: Workload, result: Result) -> None:
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
    if "eager" not in result.samples:
        return
    # Eager's own roundings of half types may turn a hinge.
    half = work.case.dtype in ("bfloat16", "float16")
    eager = (work.widened() if half else work).outcome(work.case.row.torch_function)
    differences = [difference(a, b) for a, b in zip(one, eager, strict=True)]
    result.wrong = not all(d <= WIDEST_ERROR[work.case.dtype] for d in differences)
    result.difference = max(differences) if all(map(math.isfinite, differences)) else None


def difference(ours: Tensor, eager: Tensor) -> float:
    """The largest, relative to the largest entry; half a step of the subnormal numbers is rounding."""
    info = torch.finfo(ours.dtype)
    apart = (ours - eager).abs().max() - info.smallest_normal * info.eps / 2
    largest = eager.abs().max().clamp_min(torch.finfo(eager.dtype).tiny)
    return (apart.clamp_min(0) / largest).item()


def peak_memory(case: Case, variant: str) -> int:
    """The most resident memory of one call, in bytes beyond what is resident before it."""
    small_pages()
    torch.ones(1 << 20).exp_()  # starts the threads
    few = replace(case, shape=tuple(min(n, 128) for n in case.shape), against_plain=None)
    Workload(few).step(variant)()
    step = Workload(case).step(variant)
    if variant == "compile":
        step()
    return growth(step)


def small_pages() -> None:
    """Huge pages round up by up to 2 MiB a tensor, which is no one's demand."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE


def growth(step: Step) -> int:
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


def needed(case: Case) -> float:
    """A generous estimate of the bytes that a case takes: examples are drawn in float64."""
    itemsize = getattr(torch, case.dtype).itemsize
    return case.numel * (3 * 8 + 16 * itemsize)


@dataclass(frozen=True)
class Job:
    """Cases to time in one process, or one case whose `memory` to take for one variant."""

    cases: tuple[Case, ...]
    plan: Plan
    memory: str | None = None


Event = tuple[str, int, Any]


def work_on(job: Job, pipe: Connection) -> None:
    """The body of a process: sends ("progress", case, (phase, done)) and ("result", case, it)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    warnings.simplefilter("ignore")
    torch.set_num_threads(job.plan.threads)
    for index, case in enumerate(job.cases):
        last = 0.0

        def report(phase: str, done: float, index: int = index) -> None:
            nonlocal last
            if time.perf_counter() - last > 0.4 or phase != "sampling":
                last = time.perf_counter()
                pipe.send(("progress", index, (phase, done)))

        outcome: Result | int | str
        try:
            if job.memory:
                report(f"memory of {job.memory}", 0.0)
                outcome = peak_memory(case, job.memory)
            else:
                outcome = time_case(case, job.plan, report)
        except Exception as error:
            outcome = reason(error)
        pipe.send(("result", index, outcome))
    pipe.close()


def stream(job: Job) -> Iterator[Event]:
    """Runs a job and yields its events; a process that dies gives its reason as the result."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work_on, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    done = 0
    try:
        while done < len(job.cases):
            try:
                event: Event = ours.recv()
            except EOFError:
                process.join()
                why = f"its process ended with exit code {process.exitcode}"
                why += " (out of memory?)" * (process.exitcode == -signal.SIGKILL)
                event = ("result", done, why)
            done += event[0] == "result"
            yield event
    finally:
        if done < len(job.cases):
            process.kill()
        process.join()
        ours.close()


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


assert REGISTRY, "no loss is registered"
