"""What `fusedloss verify` measures: the paths, their answers to the probes, and the errors in ulps."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ... import engines
from ...core import trace
from ...engines import cpu
from ...engines.cpu import load
from ...front.definition import REGISTRY, Loss
from ...kinds import Call
from ...kinds.distill import DistillCall
from ...kinds.heads import LinearCall
from ...route import dispatch
from . import exact
from .arguments import interprets
from .exact import Exact
from .probes import Probe, flat

CAPABILITIES = ("default", "avx2", "avx512")  # each machine runs those up to its own
SUM_BOUND = 1.0  # ulp, of the kernels; the formula sums as PyTorch does
UNDERFLOW = 4  # steps of the smallest number that count as one ulp
LONGEST = "mse_loss"  # the one whose sum is made very long: all are made by the same code
TERMS = 2**20  # of a sum, before it is repeated
TRITON = "triton"  # the GPU kernels: on a GPU, or else interpreted
INTERPRETED = {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Path:
    """A way to compute a loss; one with an environment runs in a process of its own."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)

    def function(self, loss: Loss) -> Callable[..., Tensor]:
        """The loss by this library, or PyTorch's, which takes what it knows of the options."""
        if self.name != "PyTorch":
            return loss.reduced
        known = inspect.signature(loss.torch_function).parameters.keys()

        def theirs(*tensors: Tensor, **options: Any) -> Tensor:
            return loss.torch_function(*tensors, **{k: options[k] for k in options.keys() & known})

        return theirs

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Inside, the losses take this path."""
        before = trace.calls()
        with contextlib.ExitStack() as stack:
            if self.name == "formula":
                stack.enter_context(trace.forced("fusedloss verify asks for it"))
            elif self.environment == INTERPRETED:
                stack.enter_context(engines.interpreted())
            yield
        ran = {how for _, how in trace.calls() - before}
        wanted = {"formula": {"formula"}, "PyTorch": set()}.get(self.name, {"kernel"})
        if not ran <= wanted:
            raise RuntimeError(f"verify: {self.name}: calls ran by {', '.join(ran)}")

    def placed(self, value: Any) -> Any:
        """A tensor where the path wants it."""
        on_gpu = self.name == TRITON and not self.environment and isinstance(value, Tensor)
        return value.cuda() if on_gpu else value


PYTORCH = Path("PyTorch")


def paths(every: bool) -> list[Path]:
    """PyTorch's last. Without `every`, only those that this process can run."""
    found = [Path("formula"), PYTORCH]
    if torch.cuda.is_available():
        found.insert(0, Path(TRITON))
    elif interprets(not every):
        found.insert(0, Path(TRITON, INTERPRETED))
    if cpu.problem():
        return found
    own = load.capability()
    found.insert(0, Path(own))
    if every:
        for name in CAPABILITIES[: CAPABILITIES.index(own)]:
            if load.path().with_name(f"libfusedloss_{name}.so").exists():
                found.insert(1, Path(name, {"ATEN_CPU_CAPABILITY": name}))
    return found


class _Reached(Exception):
    pass


def captured(probe: Probe) -> tuple[Call, tuple[Any, ...]] | None:
    """The call that a probe becomes; None where a function of the user's stands between."""
    found: list[Any] = []

    def by_formula(call: Any, tensors: tuple[Any, ...]) -> Any:
        found.extend((call, tensors))
        raise _Reached

    def of_head(call: LinearCall, *tensors: Any) -> Any:
        by_formula(call, tensors)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(_Reached))
        stack.enter_context(trace.forced("no kernel is to run"))
        stack.enter_context(mock.patch.object(dispatch, "by_formula", by_formula))
        for kind in (LinearCall, DistillCall):
            stack.enter_context(mock.patch.object(kind, "by_formula", of_head))
        probe.registered.reduced(*probe.tensors, **probe.options, reduction="none")
    call, tensors = found
    learned = probe.registered.differentiable
    own = isinstance(call, LinearCall) or all(tensors[k] is probe.tensors[k] for k in learned)
    return (call, tensors) if own else None


# Of a probe: the value and then the gradients, for each layout and reduction ("sum" gives no value).
Answer = list[tuple[str, list[Tensor | None]]]


def answer(probe: Probe, path: Path) -> Answer:
    found: Answer = []
    loss = probe.registered
    if path.name == TRITON and not loss.triton:
        return found
    function, classes = path.function(probe.registered), len(probe.layouts) > 1
    options = {name: path.placed(value) for name, value in probe.options.items()}
    for layout in probe.layouts:
        arranged = probe.arranged(layout)
        for reduction in ("none", "sum"):
            leaves = [
                path.placed(t).requires_grad_(k in probe.registered.differentiable)
                for k, t in enumerate(arranged.tensors)
            ]
            learned = {
                k: options[k].clone().requires_grad_()
                for k in probe.registered.learned
                if k in options
            }
            try:
                value = function(*leaves, **{**options, **learned}, reduction=reduction)
            except NotImplementedError:  # half types, of CTC and of margins over classes
                if path != PYTORCH:
                    raise
                return []
            wanted = [leaves[k] for k in probe.registered.differentiable] + [*learned.values()]
            grads = torch.autograd.grad(value, wanted, torch.ones_like(value))
            if path == PYTORCH and probe.registered.kind == "sequences":
                grads = ()  # they are those after log_softmax, docs/compatibility.md
            first = flat(value.detach().cpu(), layout, False) if reduction == "none" else None
            results = [first, *(flat(g.cpu(), layout, classes) for g in grads)]
            found.append((f"{layout}, {reduction}", results))
    return found


def answers(probes: Sequence[Probe], path: Path, tick: Callable[[], None]) -> list[Answer]:
    found = []
    with warnings.catch_warnings(), path.chosen():
        warnings.simplefilter("ignore")
        for probe in probes:
            found.append(answer(probe, path))
            tick()
    return found


@dataclass
class Errors:
    """Of one quantity of one loss in one type by one path, in ulps."""

    values: list[Tensor] = field(default_factory=list)
    exceeded: int = 0
    worst: tuple[float, str] = (0.0, "")

    def add(
        self, found: Tensor, want: Exact, bound: float, compute: torch.dtype, where: str
    ) -> None:
        error, allowed = errors(found, want, bound, compute)
        self.values.append(error.flatten())
        self.exceeded += int((error > allowed).sum())
        if error.numel() and (top := error.max().item()) > self.worst[0]:
            at = int(error.argmax())
            got, high = found.flatten()[at].item(), want.high.flatten()[at].item()
            self.worst = top, f"{where}, element {at}: {got!r}, exactly {high!r}"

    @property
    def greatest(self) -> float:
        return self.worst[0]

    @property
    def tail(self) -> float:
        """The 99.9th percentile."""
        every = torch.cat(self.values).sort().values
        return every[math.ceil(0.999 * len(every)) - 1].item()

    @property
    def count(self) -> int:
        return sum(len(v) for v in self.values)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the floats of `dtype` around each float64."""
    info = torch.finfo(dtype)
    least = math.frexp(info.smallest_normal)[1]
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.full_like(value, info.eps), exponent.clamp_min(least) - 1)


def errors(found: Tensor, want: Exact, bound: float, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each error, and what is allowed: `bound` in the type computed in, and a rounding to store it."""
    info = torch.finfo(found.dtype)
    got = found.double()
    own = ulp(want.high, found.dtype)
    # Where numbers lose digits to underflow, a weight multiplies what is lost.
    least = torch.finfo(compute).smallest_normal * torch.finfo(compute).eps
    known = want.unit.clamp_min(UNDERFLOW * least)
    unit = torch.maximum(own, known)
    allowed = bound * torch.maximum(ulp(want.high, compute), known)
    if found.dtype != compute:
        allowed = allowed + own / 2
    error = ((got - want.high) - want.low).abs() / unit
    # Beyond the largest number both it and inf are right.
    over = want.high.abs() >= info.max
    right = over & (got.sign() == want.high.sign()) & (got.abs() >= info.max)
    right |= want.high.isnan() & got.isnan()
    error = torch.where(right, 0.0, error)
    error = torch.where(~right & (over | ~got.isfinite() | want.high.isnan()), math.inf, error)
    return error, allowed / unit


@dataclass(frozen=True)
class Sum:
    """A sum against the exact sum of its terms, in ulps."""

    loss: str
    dtype: str
    reduction: str
    path: str
    terms: int
    error: float
    bound: float | None


def sums(keys: Sequence[str], path: Path, repeat: int, tick: Callable[[], None]) -> list[Sum]:
    found: list[Sum] = []
    with warnings.catch_warnings(), path.chosen():
        warnings.simplefilter("ignore")
        most = 1 if path.environment == INTERPRETED else 4  # an interpreter takes its time
        for key in keys:
            for dtype in (torch.float32, torch.float64) if REGISTRY[key].reductions else ():
                times = repeat if key == LONGEST and most > 1 else min(repeat, most)
                found += _sums(REGISTRY[key], dtype, path, times)
                tick()
    return found


def _sums(loss: Loss, dtype: torch.dtype, path: Path, repeat: int) -> Iterator[Sum]:
    generator = torch.Generator().manual_seed(3)
    rows = (TERMS // 64 if loss.rows else TERMS) // (1 if repeat > 1 else 16)
    shape = (rows, 8) if loss.rows else (rows,)
    tensors = tuple(map(path.placed, loss.example(shape, dtype, generator)))
    options = next(iter(loss.options.values()))(tensors, generator)
    function = functools.partial(path.function(loss), **options)
    terms = function(*tensors, reduction="none").double().flatten().tolist()
    rows = len(terms)
    once = math.fsum(terms)
    low = math.fsum([*terms, -once])
    if not loss.rows:
        # The same terms again and again, without memory.
        tensors = tuple(t.expand(repeat, *t.shape) for t in tensors)
        rows, once, low = repeat * rows, repeat * once, repeat * low
    # In the mean of sequences each has a divisor of its own.
    for reduction in ("sum", "mean")[: 1 if loss.kind == "sequences" else 2]:
        parts = rows if reduction == "mean" else 1
        if reduction == "mean" and "ignore_index" in options and not loss.rows:
            parts = int((tensors[1] != options["ignore_index"]).sum())
        got = function(*tensors, reduction=reduction)
        with exact.mp.workdps(exact.mp.dps):
            want = (exact.mp.mpf(once) + low) / parts
            high = float(want)
            size = ulp(torch.tensor(high, dtype=torch.float64), dtype).item()
            error = float(abs(exact.mp.mpf(got.item()) - want)) / size
        limit = None if path.name in ("formula", "PyTorch") else SUM_BOUND
        yield Sum(loss.key, _name(dtype), reduction, path.name, rows, error, limit)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# A path of another environment: the probes and the answers travel through files.


def start(path: Path, folder: File, request: Any) -> subprocess.Popen[bytes]:
    given, found = folder / f"{path.name}.in", folder / f"{path.name}.out"
    given.write_bytes(pickle.dumps((path, *request)))
    code = "from fusedloss.cli.verify.measured import serve; import sys; serve(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(given), str(found)],
        env={**os.environ, **path.environment},
        stderr=subprocess.PIPE,
    )


def serve(given: str, found: str) -> None:
    path, probes, keys, repeat = pickle.loads(File(given).read_bytes())
    torch.set_num_threads(1)
    every = answers(probes, path, lambda: None), sums(keys, path, repeat, lambda: None)
    File(found).write_bytes(pickle.dumps(every))


def finish(path: Path, folder: File, process: subprocess.Popen[bytes]) -> Any:
    _, complaint = process.communicate()
    if process.returncode:
        raise RuntimeError(f"verify: {path.name}: {complaint.decode(errors='replace')}")
    return pickle.loads((folder / f"{path.name}.out").read_bytes())
