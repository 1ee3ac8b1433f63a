"""What the arguments of `fusedloss bench` ask for, checked before anything is measured."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ...front.definition import REGISTRY
from .cases import CASES, CHOICES, DTYPES, LARGEST, QUICK_SIZES, SIZES, Case, sweep
from .harness import Job, Plan, Result, jobs

FORMAT = 1  # of the JSON file


class UsageError(ValueError):
    """One line for the user; the exit code is 2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases, sizes and samples: two minutes at most")
    add(
        "--linear",
        action="store_true",
        help="linear cross entropy instead; takes --quick, --threads",
    )
    add(
        "--calls",
        action="store_true",
        help="what a call on 3 x 5 costs before its kernel, and the import; takes --quick, --threads",
    )
    add("--only", nargs="+", metavar="LOSS", help="these losses alone")
    add("--dtype", nargs="+", metavar="DTYPE", help=f"these of {', '.join(DTYPES)}")
    add(
        *("--sizes",),
        nargs="+",
        metavar="SIZE",
        help=f"the sweep alone, at these of {', '.join(SIZES)}, or shapes like 1024x32000",
    )
    add("--no-sweep", action="store_true", help="the cases alone")
    add("--variants", nargs="+", metavar="NAME", help=f"these of {', '.join(CHOICES)}, and ours")
    add(
        *("--device",),
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda takes --only, --linear and --output of these options; default: %(default)s",
    )
    add("--threads", metavar="N", help="default: what torch takes")
    add("--against", type=Path, metavar="FILE", help="compare with the JSON of an earlier run")
    add("--targets", action="store_true", help="print which targets are met")
    add(
        *("--output",),
        type=Path,
        default=Path("fusedloss-bench.json"),
        metavar="FILE",
        help="default: %(default)s",
    )
    add(
        *("--html",),
        type=Path,
        default=Path("fusedloss-bench.html"),
        metavar="FILE",
        help="default: %(default)s",
    )
    add(
        *("--picture",),
        type=Path,
        metavar="FILE",
        help="the ratios (with --linear the memory) as an SVG or PNG; needs matplotlib",
    )


@dataclass(frozen=True)
class Selection:
    """What the arguments ask for."""

    cases: tuple[Case, ...]
    variants: tuple[str, ...]
    threads: int
    quick: bool
    then: tuple[Result, ...]

    def plan(self, case: Case) -> Plan:
        compiles = "compile" in self.variants and (not self.quick or case.quick_compile)
        variants = tuple(v for v in self.variants if v != "compile" or compiles)
        if case.group == "sweep":
            timing = (0.3, 0.002, 3) if self.quick else (1.5, 0.005, 5)
        else:
            timing = (1.2, 0.005, 3) if self.quick else (6.0, 0.01, 9)
        return Plan(variants, self.threads, *timing)

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
    losses = chosen_losses(args.only)
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
    then = () if args.against is None else earlier(args.against)
    return Selection(tuple(cases), variants, chosen_threads(args.threads), args.quick, then)


# `--linear` times the others.
TIMED = tuple(key for key, row in REGISTRY.items() if row.kind != "heads")


def chosen_losses(words: Sequence[str] | None, valid: Sequence[str] = TIMED) -> tuple[str, ...]:
    """Those of the `valid` registry rows; `mse`, `mse_loss` and `MSELoss` name the same, a name all its
    variants."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "").removesuffix("loss")

    if words is None:
        return tuple(valid)
    found: dict[str, None] = {}
    for word in words:
        keys = [
            key
            for key, row in ((key, REGISTRY[key]) for key in valid)
            if plain(word) in (plain(key), plain(row.name), plain(row.module))
        ]
        if not keys:
            raise UsageError(f"--only: must be among {', '.join(valid)}, got {word!r}")
        found.update(dict.fromkeys(keys))
    return tuple(found)


def among(option: str, words: Sequence[str] | None, valid: Sequence[str]) -> tuple[str, ...] | None:
    for word in words or ():
        if word not in valid:
            raise UsageError(f"{option}: must be among {', '.join(valid)}, got {word!r}")
    return None if words is None else tuple(v for v in valid if v in words)


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


def chosen_threads(word: str | None) -> int:
    if word is None:
        return torch.get_num_threads()
    if not word.isdecimal() or not 1 <= int(word) <= 4096:
        raise UsageError(f"--threads: must be an integer from 1 to 4096, got {word!r}")
    return int(word)


def check_picture(path: Path | None) -> None:
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise UsageError("--picture: needs matplotlib (pip install 'fusedloss[demo]')")
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--picture: must end in .svg or .png, got {str(path)!r}")
    check_writable("--picture", path)


def check_writable(option: str, path: Path) -> None:
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(
            f"{option}: must be a file that can be written, got {str(path)!r} ({error.strerror})"
        ) from None
    if not existed:
        path.unlink()


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
