"""What the library knows of a loss, for its page: signature, docstring, errors, digits, times."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusedloss
from fusedloss.cli.bench.harness import Result
from fusedloss.front import docs, strict
from fusedloss.front.loss import FUNCTIONS
from fusedloss.front.modules import MODULES

ROOT = Path(__file__).parents[2]
TORCH = "https://docs.pytorch.org/docs/stable/generated/torch.nn"
# What the signature does not say, since torch need not have it.
UNTYPED = {
    "options": "LinearCrossEntropyOptions | None",
    "class_group": "ProcessGroup | DeviceMesh | None",
    "device": "device | None",
    "dtype": "dtype | None",
}
# Modules that have a page of their own, as they have no function, and the functions that they compute by.
MODULES_ALONE = {"AdaptiveLogSoftmaxWithLoss": "linear_log_prob"}
SHAPE = re.compile(r"\((?:|(?:[A-Z]|\.\.\.)(?:, (?:[A-Z]|d1|1|\.\.\.))*)\)")


class Argument(NamedTuple):
    name: str
    kind: str  # "Tensor", "float", ...
    default: str  # as source; empty where there is none
    keyword: bool
    ours: bool  # PyTorch's function lacks it
    text: str
    shape: str


class Digits(NamedTuple):
    """A row of docs/accuracy.md: the greatest errors, in ulps."""

    row: str
    dtype: str
    what: str
    kernels: str
    bound: str
    torch: str


@dataclass
class Facts:
    name: str
    module: str
    text: str  # of the docstring, before its sections
    arguments: list[Argument]
    returns: str
    raises: list[tuple[str, list[str]]]
    rules: list[str]  # what `checks("strict")` refuses
    ours: bool  # PyTorch has neither function nor module of the name
    digits: list[Digits] = field(default_factory=list)
    times: list[Timed] = field(default_factory=list)

    @property
    def namesake(self) -> str:
        """The page of PyTorch's module or function."""
        if not self.ours and self.module:
            return f"{TORCH}.{self.module}.html"
        return "" if self.ours else f"{TORCH}.functional.{self.name}.html"

    @property
    def reference(self) -> str:
        """Where the reference has it."""
        return f"fusedloss.{'nn' if self.name in MODULES_ALONE else 'functional'}.{self.name}"


class Timed(NamedTuple):
    result: Result
    source: str
    machine: str


def names() -> list[str]:
    return sorted([*FUNCTIONS, *MODULES_ALONE], key=str.lower)


def _module_of(name: str) -> str:
    if name in MODULES_ALONE:
        return name
    said = f"See :func:`fusedloss.functional.{name}`"
    return next((n for n, m in _modules().items() if (m.__doc__ or "").startswith(said)), "")


def _modules() -> dict[str, Any]:
    return {n: m for n, m in vars(fusedloss.nn).items() if inspect.isclass(m)}


def _kind(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return UNTYPED.get(parameter.name, type(parameter.default).__name__)
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = text.replace("torch.", "").replace("typing.", "").replace("collections.abc.", "")
    text = re.sub(r"Optional\[(.*)\]", r"\1 | None", text)
    return UNTYPED.get(parameter.name, text)


def _shape(text: str, kind: str) -> str:
    """What the docstring says of a tensor's shape, without the words around it."""
    if "Tensor" not in kind:
        return ""
    if found := SHAPE.findall(text):
        return ", ".join(dict.fromkeys(found))
    words = {
        "any shape": "any",
        "input's shape": "as input",
        "same shape": "as the first",
        "likewise": "as the first",
        "target's shape": "as target",
        "broadcasts": "broadcasts",
        "a number": "()",
        "0-dim": "()",
        "first dimensions": "(N) …",
    }
    return next((short for long, short in words.items() if long in text), "")


def _parameters(known: Any) -> Mapping[str, inspect.Parameter]:
    """A function's; or a module's, of its constructor and of its call."""
    if not inspect.isclass(known):
        return inspect.signature(known).parameters
    methods: Any = known.__init__, known.forward
    found = {n: p for each in methods for n, p in inspect.signature(each).parameters.items()}
    return {n: p for n, p in found.items() if n != "self"}


def of(name: str) -> Facts:
    alone = name in MODULES_ALONE
    function: Any = MODULES[name] if alone else FUNCTIONS[name]
    text, sections = docs.parts_of(inspect.cleandoc(function.__doc__ or ""))
    said = docs.items(sections["Args"])
    theirs = getattr(torch.nn if alone else torch.nn.functional, name, None)
    known = _parameters(theirs) if theirs else {}
    arguments = []
    for n, p in _parameters(function).items():
        kind, line = _kind(p), said.get(n, "")
        default = "" if p.default is p.empty else repr(p.default)
        keyword = p.kind is p.KEYWORD_ONLY
        ours = bool(known) and n not in known
        arguments.append(Argument(n, kind, default, keyword, ours, line, _shape(line, kind)))
    raises = [line.split(": ", 1) for line in docs.lines(sections.get("Raises", ""))]
    return Facts(
        name=name,
        module=_module_of(name),
        text=text,
        arguments=arguments,
        returns=" ".join(sections["Returns"].split()),
        raises=[(kind, what.rstrip(".").split("; ")) for kind, what in raises],
        rules=[" ".join((r.__doc__ or "").split()) for r in strict.RULES.get(name, ())],
        ours=theirs is None,
        digits=[d for d in digits() if d.row.partition("[")[0] == name],
        times=times().get(name, []),
    )


@cache
def digits() -> list[Digits]:
    page = (ROOT / "docs/accuracy.md").read_text()
    table = page.partition("<!-- accuracy: begin -->")[2].partition("<!-- accuracy: end -->")[0]
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 8:
            row, dtype, what, kernels, bound, _, _, theirs = cells
            found.append(Digits(row.strip("`"), dtype, what, kernels, bound, theirs))
    return found


def _documents() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Of the CPU's benches, the newest first."""
    every = [(p, json.loads(p.read_text())) for p in (ROOT / "benchmarks/results").glob("*.json")]
    yield from sorted(every, key=lambda pair: pair[1].get("date", ""), reverse=True)


def machine(document: dict[str, Any]) -> str:
    m = document["machine"]
    return f"{m['cpu'].replace('(R)', '')}, {m['cores']} cores, {m['capability']}"


@cache
def times() -> dict[str, list[Timed]]:
    """Of each loss its cases, each from the newest file that has PyTorch beside ours, or else ours alone."""
    found: dict[tuple[str, str], Timed] = {}
    for path, document in _documents():
        if "format" not in document or document.get("kind"):
            continue
        for fields in document["results"]:
            case = fields["case"]
            name = case["loss"].partition("[")[0]
            if case["group"] == "sweep" or "new" in fields["samples"] or name not in FUNCTIONS:
                continue
            timed = Timed(Result.from_json(fields), path.name, machine(document))
            key = name, case["title"]
            if key not in found or _beside(timed) > _beside(found[key]):
                found[key] = timed
    by_name: dict[str, list[Timed]] = {}
    for (name, _), timed in found.items():
        by_name.setdefault(name, []).append(timed)
    return by_name


def _beside(timed: Timed) -> int:
    return sum(v in timed.result.samples for v in ("eager", "compile"))


class Head(NamedTuple):
    """A case of `fusedloss bench --linear`."""

    title: str
    samples: dict[str, list[float]]
    peaks: dict[str, int]
    gradient_bytes: int
    source: str
    machine: str


def heads() -> list[Head]:
    for path, document in _documents():
        if document.get("kind") != "linear":
            continue
        found = []
        for fields in document["results"]:
            case = fields["case"]
            if not fields["samples"] or not fields["peaks"]:  # of time or memory alone
                continue
            sizes = case["n"], case["d"], case["v"]
            n, d, v = sizes
            size = getattr(torch, case["dtype"]).itemsize
            title = f"{' x '.join(map(str, sizes))} {case['dtype']}"
            given = fields["samples"], fields["peaks"], size * (n * d + v * d)
            found.append(Head(title, *given, path.name, machine(document)))
        return found
    return []


def is_tensor(argument: Argument) -> bool:
    return Tensor.__name__ in argument.kind
