"""What the arguments of `fusedloss bench` ask for, checked before anything is measured."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..arguments import (
    UsageError,
    among,
    check_picture,
    check_writable,
    chosen_losses,
    chosen_threads,
)
from .builds import package_folder
from .cases import CASES, CHOICES, DTYPES, LARGEST, QUICK_SIZES, SIZES, TIMED, Case, sweep
from .cpu import Job, jobs
from .harness import Plan, Result
from .machine import FORMAT


@dataclass(frozen=True)
class Selection:
    """What the arguments ask for."""

    cases: tuple[Case, ...]
    variants: tuple[str, ...]
    threads: int
    quick: bool
    then: tuple[Result, ...]
    against: str  # the folder of another build

    def plan(self, case: Case) -> Plan:
        compiles = "compile" in self.variants and (not self.quick or case.quick_compile)
        variants = tuple(v for v in self.variants if v != "compile" or compiles)
        if case.group == "sweep":
            timing = (0.3, 0.002, 3) if self.quick else (1.5, 0.005, 5)
        else:
            timing = (1.2, 0.005, 3) if self.quick else (6.0, 0.01, 9)
        return Plan(variants, self.threads, *timing, against=self.against)

    def jobs(self) -> Iterator[Job]:
        """The cases in order, the memory of each after its times, and the sweep at the end."""
        for case in self.cases:
            if case.group == "sweep":
                continue
            plan = self.plan(case)
            yield Job((case,), plan)
            for variant in plan.variants:
                if not self.quick or variant in ("ours", "eager"):
                    yield Job((case,), plan, memory=variant)
        points = [case for case in self.cases if case.group == "sweep"]
        if points:
            yield from jobs(points, self.plan(points[0]))


def selection(args: argparse.Namespace) -> Selection:
    """Checks the arguments: whatever is wrong is found before anything is measured."""
    losses = chosen_losses(args.only, TIMED)
    dtypes = among("--dtype", args.dtype, DTYPES)
    variants = among("--variants", args.variants, CHOICES) or CHOICES
    variants = tuple(v for v in CHOICES if v == "ours" or v in variants)
    sizes = chosen_sizes(args.sizes)
    if args.no_sweep and sizes:
        raise UsageError("--no-sweep: --sizes is for the sweep; give one of them")
    cases = [] if sizes else [c for c in CASES if c.loss in losses]
    cases = [c for c in cases if (c.quick or not args.quick) and c.dtype in (dtypes or DTYPES)]
    if not args.no_sweep:
        sizes = sizes or {k: v for k, v in SIZES.items() if not args.quick or k in QUICK_SIZES}
        cases += sweep(losses, dtypes or (DTYPES[:1] if args.quick else DTYPES), sizes)
    if not cases:
        raise UsageError("--only, --dtype: no case is of these; leave out --no-sweep")
    for path in (args.output, args.html):
        check_writable("--html" if path is args.html else "--output", path)
    check_picture(args.picture)
    against = other_build(args.against)
    then = () if args.against is None or against else earlier(args.against)
    threads = chosen_threads(args.threads)
    return Selection(tuple(cases), variants, threads, args.quick, then, against)


def chosen_sizes(words: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {}
    for word in words or ():
        if word in SIZES:
            sizes[word] = SIZES[word]
        elif re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", word):
            sizes[word] = tuple(map(int, word.split("x")))
        if word not in sizes or torch.Size(sizes[word]).numel() > LARGEST:
            raise UsageError(
                f"--sizes: must be among {', '.join(SIZES)}, or a shape of two dimensions or more "
                f"like 1024x32000 and at most 64M elements, got {word!r}"
            )
    return sizes


def other_build(path: Path | None) -> str:
    """The folder with the package that `--against` names, if it names a folder."""
    if path is None or not path.is_dir():
        return ""
    if (folder := package_folder(path)) is None:
        raise UsageError(f"--against: must be a checkout or installed fusedloss, got {str(path)!r}")
    return folder


def earlier(path: Path) -> tuple[Result, ...]:
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, not {FORMAT}")
        return tuple(Result.from_json(fields) for fields in document["results"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UsageError(
            f"--against: must be a JSON file of `fusedloss bench`, got {str(path)!r} ({why})"
        ) from None
