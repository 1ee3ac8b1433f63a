"""What every bench shares: the tensors of a case and its variants, the rounds of samples, and the result."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from ..processes import reason
from .cases import Case, learned, yardstick

Step = Callable[[], object]
Loader = Callable[[], Callable[..., Tensor]]  # imports or compiles a loss
Report = Callable[[str, float], None]
Sampler = Callable[[int], float]  # seconds of a call, the mean of so many

MEGA = 1e6
WARM_UP = 3
WIDEST_ERROR = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.01, "float16": 0.002}


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
    as_built: bool | None = None  # whether another build gives the same bits

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

    def shortest(self, variant: str) -> float | None:
        """To which other programs only add."""
        return min(self.samples.get(variant, ()), default=None)

    def shortest_ratio(self, variant: str, to: str) -> float | None:
        a, b = self.shortest(variant), self.shortest(to)
        return a / b if a and b else None

    def beyond(self, variant: str) -> int | None:
        """The peak beyond the inputs and the gradients, in bytes."""
        peak = self.peaks.get(variant)
        return None if peak is None else peak - self.gradient_bytes

    def excess(self, variant: str) -> float | None:
        """The same in MB."""
        beyond = self.beyond(variant)
        # Of the gradient's own pages some may have been resident before.
        return None if beyond is None else max(0, beyond) / MEGA

    def to_json(self) -> dict[str, Any]:
        samples = {k: [float(f"{s:.5g}") for s in each] for k, each in self.samples.items()}
        case = {**asdict(self.case), "shape": list(self.case.shape)}
        del case["at_most"]
        fields = {**asdict(self), "case": case, "samples": samples}
        return {k: v for k, v in fields.items() if k != "as_built" or v is not None}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Result:
        case = {**fields["case"], "shape": tuple(fields["case"]["shape"])}
        return Result(**{**fields, "case": Case(**case)})


class Work:
    """The tensors of a case on a device, and its variants as calls without arguments.

    A call runs forward, `backward()` and drops the gradient: what a training step does. `.grad` is
    None before, so that autograd takes the new gradient over as it is, and copies it only for a
    variant that cannot give it away. Memory is freed by the one who allocated it, on the clock.
    """

    learned: tuple[int, ...]
    checked = True  # against eager, and on other numbers of threads

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            tensors, self.settings = self.draw(generator)
        self._fill(tensors)

    def draw(self, generator: Generator) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        case = self.case
        self.learned = learned(case.row)
        tensors = case.row.example(case.shape, getattr(torch, case.dtype), generator)
        return tensors, case.settings(tensors, generator)

    def _fill(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors
        self.leaves = [tensors[k].requires_grad_() for k in self.learned]
        self.bare = tuple(t.detach() for t in tensors)

    @property
    def yardstick(self) -> str:
        return yardstick(self.case.row, self.bare).label

    def losses(self) -> Mapping[str, Loader]:
        """The variants that are losses of the tensors, each behind what loads it."""
        row = self.case.row
        return {
            "ours": lambda: row.function,
            "eager": lambda: row.torch_function,
            "compile": lambda: compiled(row.torch_function),
        }

    def step(self, variant: str) -> Step:
        if variant in (losses := self.losses()):
            return self.differentiate(losses[variant]())
        if variant == "plain":
            plain = Case("", self.case.against_plain or "", self.case.shape, self.case.dtype)
            return type(self)(plain, self.device).step("ours")
        rod, bare = yardstick(self.case.row, self.bare), self.bare
        if variant == "yardstick":
            return lambda: rod.fresh(*bare)
        out = [torch.empty_like(leaf).detach() for leaf in self.leaves]
        return lambda: rod.held(out, *bare)

    def differentiate(self, function: Callable[..., Tensor]) -> Step:
        tensors, settings, leaves = self.tensors, self.settings, self.leaves

        def step() -> None:
            function(*tensors, **settings).backward()
            for leaf in leaves:
                leaf.grad = None

        return step

    def widened(self) -> Work:
        """The same values in float32."""
        other = copy.copy(self)
        other._fill(tuple(map(_widened, self.bare)))
        other.settings = {name: _widened(value) for name, value in self.settings.items()}
        return other

    def outcome(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """The loss and its gradients."""
        loss = function(*self.tensors, **self.settings)
        return [loss.detach(), *torch.autograd.grad(loss, self.leaves)]


def _widened(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().float() if floating else value


def compiled(function: Callable[..., Tensor], anew: bool = True) -> Callable[..., Tensor]:
    """The function under torch.compile, which forgets what it compiled before if `anew`."""
    import torch._inductor.config

    # A pool of compilers would still be closing while the clock runs.
    torch._inductor.config.compile_threads = 1
    if anew:
        torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


@dataclass(frozen=True)
class Plan:
    """How to measure: which variants, on how many threads, and how long."""

    variants: tuple[str, ...]
    threads: int
    seconds: float  # of sampling a case, or a little more where the fewest rounds take longer
    sample: float  # the shortest sample in seconds; fast calls are repeated to fill it
    fewest: int
    most: int = 60
    against: str = ""  # the folder of another build, which is measured beside this one
    work: type[Work] = Work

    @property
    def clock(self) -> Callable[[], float]:
        """Of long calls on one thread its own time, which other programs do not stretch."""
        return time.thread_time if self.threads == 1 and not self.sample else time.perf_counter


def unheard(phase: str, done: float) -> None:
    """Stands for a report that no one wants."""


def begin(work: Work) -> Result:
    inputs, gradients = (sum(t.nbytes for t in each) for each in (work.tensors, work.leaves))
    return Result(work.case, input_bytes=inputs, gradient_bytes=gradients)


def prepared(
    work: Work,
    variants: Iterable[str],
    result: Result,
    report: Report = unheard,
    look: Callable[[str, Step], None] = lambda variant, step: None,
) -> dict[str, Step]:
    """The variants that run, warm and looked at; of the others the result tells why not."""
    steps: dict[str, Step] = {}
    for variant in variants:
        report("compiling" if variant == "compile" else "warming up", 0.0)
        try:
            step = work.step(variant)
            warm_up(step)
            look(variant, step)
        except Exception as error:
            result.skipped[variant] = reason(error)
        else:
            steps[variant] = step
    return steps


def warm_up(step: Step) -> None:
    """A few calls, or one that takes long."""
    start = time.perf_counter()
    for _ in range(WARM_UP):
        step()
        if time.perf_counter() - start > 0.5:
            break


def wall(step: Step, calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """By the host's clock. A call before it finds caches, allocator and pages as another variant left them."""
    step()
    repeat = itertools.repeat(None, calls)
    start = clock()
    for _ in repeat:
        step()
    return (clock() - start) / calls


def interleave(
    samplers: Mapping[str, Sampler], plan: Plan, report: Report = unheard
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Rounds of one sample of each variant, in a new order each round."""
    calls = {name: fill(sampler, plan.sample) for name, sampler in samplers.items()}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order, generator = list(samplers), random.Random(0)
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for done in range(1, plan.most + 1):
        generator.shuffle(order)
        for name in order:
            samples[name].append(samplers[name](calls[name]))
        spent = time.perf_counter() - start
        report("sampling", min(max(done / plan.most, spent / max(plan.seconds, 1e-9)), 1.0))
        if done >= plan.fewest and spent >= plan.seconds:
            break
    gc.enable()
    return samples, calls


def fill(sampler: Sampler, seconds: float) -> int:
    """How many calls make a sample of this length: counted anew until they do."""
    calls = 1
    while seconds and (spent := calls * sampler(calls)) < seconds:
        calls = max(calls + 1, min(10 * calls, math.ceil(1.2 * calls * seconds / spent)))
    return calls


def compare(work: Work, ours: list[Tensor], result: Result) -> None:
    """Whether ours is what eager gives. Eager's own roundings of half types may turn a hinge."""
    dtype = work.case.dtype
    wide = work.widened() if dtype in ("bfloat16", "float16") else work
    eager = wide.outcome(wide.losses()["eager"]())
    pairs = list(zip(ours, eager, strict=True))
    if work.case.row.kind == "sequences":  # eager's gradient is another before log_softmax
        pairs = pairs[:1]
    differences = [difference(a, b) for a, b in pairs]
    result.wrong = not all(d <= WIDEST_ERROR[dtype] for d in differences)
    result.difference = max(differences) if all(map(math.isfinite, differences)) else None


def difference(ours: Tensor, eager: Tensor) -> float:
    """The largest, relative to the largest entry; half a step of the subnormal numbers is rounding."""
    info = torch.finfo(ours.dtype)
    apart = (ours - eager).abs().max() - info.smallest_normal * info.eps / 2
    largest = eager.abs().max().clamp_min(torch.finfo(eager.dtype).tiny)
    return (apart.clamp_min(0) / largest).item()
