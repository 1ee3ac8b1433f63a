"""`fusedloss bench --compiled`: ours under torch.compile, beside ours as called and PyTorch's compiled.

And training steps whose model and loss are one graph, with our losses in PyTorch's place and without: an MLP
before each loss of `torch.nn.functional`, and a small decoder before cross entropy. A call runs forward and
backward, a step the optimizer too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ...front.definition import REGISTRY
from ...patch import FUNCTIONS, NAME, patch, unpatch
from ..arguments import chosen_losses
from ..decoder import BATCH, CONTEXT, Decoder
from ..processes import available, in_a_process
from .cases import CASES, SIZES, TIMED, Case, sweep
from .cpu import needed, time_case
from .harness import Loader, Plan, Result, Step, Work, compiled
from .machine import Run
from .selection import chosen_sizes
from .tables import clock, coloured, new_table

LOSSES = ("ours", "compiled", "compile")
STEPS = ("patched", "plain")
CALLED, BESIDE, FASTER, STEP = 1.08, 1.05, 2.0, 1.02  # the targets, with noise
LARGE = 1 << 22  # elements, from which ours is to be `FASTER`
FEATURES, HIDDEN, VOCABULARY = 64, 64, 32000
RATE = 1e-6  # what is trained stays as it was drawn
# What makes a model's output an input of the loss.
LAST: dict[str, Callable[[Tensor], Tensor]] = {
    "binary_cross_entropy": torch.sigmoid,
    "kl_div": partial(F.log_softmax, dim=-1),
    "nll_loss": partial(F.log_softmax, dim=-1),
    "ctc_loss": partial(F.log_softmax, dim=-1),
}
DECODER = Case(f"decoder, CE over {VOCABULARY} classes", "cross_entropy", (), group="step")
Bound = tuple[str, str, float]  # a variant's time over another's is at most this


class CompiledWork(Work):
    checked = False  # by tests

    def losses(self) -> Mapping[str, Loader]:
        row = self.case.row
        return {
            "ours": lambda: row.function,
            "compiled": lambda: compiled(row.function, anew=False),
            "compile": lambda: compiled(row.torch_function, anew=False),
        }


class StepWork(Work):
    """A model before the loss; `patched` and `plain` compile the same, with and without our losses."""

    checked = False

    def draw(self, generator: Generator) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        self.learned = ()
        if self.case != DECODER:
            return super().draw(generator)[0], {}
        ids = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
        return (ids[:, :-1].contiguous(), ids[:, 1:].flatten()), {}

    def step(self, variant: str) -> Step:
        torch.manual_seed(0)
        model, loss = self.decoder() if self.case == DECODER else self.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        fast = compiled(loss, anew=False)
        ours = variant == "patched"

        def step() -> None:
            _settle(ours)
            fast().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def mlp(self) -> tuple[nn.Module, Callable[[], Tensor]]:
        name, (like, *others) = self.case.row.name, self.bare
        model = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, like.shape[-1])
        )
        x = torch.randn(*like.shape[:-1], FEATURES)
        last, function = LAST.get(name, lambda y: y), getattr(F, name)
        return model, lambda: function(last(model(x)), *others)

    def decoder(self) -> tuple[nn.Module, Callable[[], Tensor]]:
        model, (ids, target) = Decoder(VOCABULARY), self.bare
        return model, lambda: F.cross_entropy(model.lm_head(model(ids).flatten(0, 1)), target)


def _settle(ours: bool) -> None:
    """Puts our losses in place or takes them away; a sample's first call does so, before the clock runs."""
    if ours is not hasattr(F, NAME):
        (patch if ours else unpatch)()


def losses(only: Sequence[str] | None, sizes: Sequence[str] | None, quick: bool) -> list[Case]:
    """The cases that the losses name, and every size; of a quick run the cases within the caches."""
    keys = chosen_losses(only, TIMED)
    named = [c for c in CASES if c.loss in keys and c.group in ("table", "beyond")[: 2 - quick]]
    if quick and not sizes:
        return named
    points = sweep(keys, ("float32",), chosen_sizes(sizes) or SIZES)
    return [*([] if sizes else named), *points]


def steps(only: Sequence[str] | None) -> list[Case]:
    names: dict[str, Case] = {}
    for key in chosen_losses(only, TIMED):
        row = REGISTRY[key]
        if row.name in FUNCTIONS and row.bench:
            shape = row.bench[0].shape
            names.setdefault(row.name, Case(f"MLP, {row.name}", key, shape, group="step"))
    return [*names.values(), *([DECODER] if "cross_entropy" in names else [])]


def bounds(case: Case) -> list[Bound]:
    """The targets of a case: ours compiled is as fast as called, and faster than PyTorch's compiled."""
    if case.group == "step":
        return [("patched", "plain", STEP)]
    found = [("compiled", "compile", BESIDE)]
    if case.numel >= LARGE:
        found.append(("compiled", "ours", CALLED))
        if case.row.name != "nll_loss":
            found[0] = ("compiled", "compile", 1 / FASTER)
    return found


def missed(result: Result) -> list[Bound]:
    ratios = ((bound, result.ratio(*bound[:2])) for bound in bounds(result.case))
    return [bound for bound, ratio in ratios if ratio is None or ratio > bound[2]]


def timing(quick: bool) -> tuple[float, float, int]:
    """Of a Plan: seconds, seconds a sample, samples."""
    return (1.5, 0.005, 3) if quick else (6.0, 0.01, 9)


def measure(cases: Sequence[Case], threads: int, quick: bool) -> Iterator[Result]:
    """Each case in a process of its own."""
    for case in cases:
        step = case.group == "step"
        kind: type[Work] = StepWork if step else CompiledWork
        plan = Plan(STEPS if step else LOSSES, threads, *timing(quick), work=kind)
        if case.shape and needed(case, plan) > available():
            yield Result(case, skipped={"ours": "it may take more memory than there is"})
            continue
        try:
            yield in_a_process(time_case, case, plan)
        except RuntimeError as error:
            yield Result(case, skipped={"ours": str(error)})


def run(args: argparse.Namespace, threads: int) -> int:
    """Measure and report; 0, or 1 if something did not run."""
    cases = [*losses(args.only, args.sizes, args.quick), *steps(args.only)]
    this = Run(threads, 160)
    results: list[Result] = []
    interrupted = False
    try:
        for result in measure(cases, threads, args.quick):
            results.append(result)
            times = ", ".join(f"{v} {clock(result.median(v))}" for v in result.samples)
            why = "; ".join(f"{v}: {text}" for v, text in result.skipped.items())
            line = "; ".join(filter(None, (times, why)))
            this.console.print(f"{result.case.title}: {line}", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        interrupted = True
    for group in (False, True):
        if chosen := [r for r in results if (r.case.group == "step") is group]:
            this.console.print(table(chosen), "")
    asked = sum(len(bounds(r.case)) for r in results)
    this.console.print(f"{asked - sum(len(missed(r)) for r in results)} of {asked} targets met")
    document = this.document(
        kind="compiled",
        quick=args.quick,
        complete=not interrupted,
        results=[r.to_json() for r in results],
    )
    this.write(args.output, document)
    if interrupted:
        return 130
    return int(any(r.skipped for r in results) or not results)


def table(results: Sequence[Result]) -> Table:
    step = results[0].case.group == "step"
    found = new_table("Training steps" if step else "Forward and backward under torch.compile")
    variants = STEPS if step else LOSSES
    pairs = [STEPS] if step else [("compiled", "ours"), ("compiled", "compile")]
    found.add_column("case", no_wrap=True)
    for name in (*variants, *(f"{a} / {b}" for a, b in pairs), "missed"):
        found.add_column(name, justify="right", no_wrap=True)
    for r in results:
        late = missed(r)
        ratios = []
        for pair in pairs:
            value, asked = r.ratio(*pair), pair in [b[:2] for b in bounds(r.case)]
            bad = asked and pair in [b[:2] for b in late]
            ratios.append(coloured(value, asked and not bad, bad))
        words = ", ".join(f"{a} / {b} ≤ {most:g}" for a, b, most in late)
        times = (clock(r.median(v)) for v in variants)
        found.add_row(escape(r.case.title), *times, *ratios, f"[red]{words}[/]" if words else "")
    return found
