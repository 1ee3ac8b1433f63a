"""The types of what definitions make, which a type checker cannot see: `python tests/stubs.py` writes them.

`make format` does so, and tests/faces/test_types.py holds them to the definitions.
"""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fusedloss
from fusedloss import nn  # noqa: F401  (defines a module of its own)
from fusedloss.front.loss import FUNCTIONS
from fusedloss.front.modules import MODULES

HOME = Path(__file__).parent.parent / "src" / "fusedloss"
HEAD = "# Printed by tests/stubs.py.\n"
NAMES = {
    "Any": "typing",
    "Callable": "collections.abc",
    "LinearCrossEntropyOptions": "torch.nn",
    "Literal": "typing",
    "LogProb": ".losses.heads",
    "overload": "typing",
    "Tensor": "torch",
}
# What type checkers shall find below fusedloss.nn; `functional` is ours.
SUBMODULES = (
    *("attention", "init", "modules", "parallel", "parameter", "utils", "utils.parametrizations"),
    *("utils.parametrize", "utils.prune", "utils.rnn"),
)
# Of two imports of a name mypy, which takes MYPY for true, heeds the first, and others the last.
BESIDE = """
MYPY: bool
if MYPY:
    {ours}
from {theirs} import *  # type: ignore[{errors}]
if not MYPY:
    {ours}
"""
# A setting by which another type is returned.
RESULTS = {"linear_log_prob": ("statistics", "LogProb")}
Parameter = inspect.Parameter


def annotation(found: Any) -> str:
    if found is Parameter.empty:
        return "Any"
    text = found if isinstance(found, str) else inspect.formatannotation(found)
    text = re.sub(r"\b(?:[a-z]\w*\.)+(?=[A-Z])", "", text)
    return re.sub(r"^Optional\[(.+)\]$", r"\1 | None", text)


def default(value: Any) -> str:
    plain = value is None or isinstance(value, bool | int | str)
    return repr(value) if plain or (isinstance(value, float) and math.isfinite(value)) else "..."


def parameters(signature: inspect.Signature, types: Mapping[str, Any]) -> str:
    """As a definition writes them; `types` are those of parameters that have none."""
    parts, named = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not named:
            parts.append("*")
            named = True
        if p.name == "self":
            parts.append("self")
            continue
        found = types.get(p.name, p.annotation) if p.annotation is p.empty else p.annotation
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        given = "" if p.default is p.empty else f" = {default(p.default)}"
        parts.append(f"{stars}{p.name}: {annotation(found)}{given}")
    return ", ".join(parts)


def function(name: str, made: Callable[..., Any]) -> str:
    signature = inspect.signature(made)
    returns = annotation(signature.return_annotation)
    if name not in RESULTS:
        return f"def {name}({parameters(signature, {})}) -> {returns}: ...\n"
    setting, other = RESULTS[name]
    without = returns.replace(f" | {other}", "")
    text = parameters(signature, {})
    forms = {
        without: re.sub(rf"\b{setting}: bool = False", f"{setting}: Literal[False] = False", text),
        other: re.sub(rf"\b{setting}: bool = False", f"{setting}: Literal[True]", text),
        returns: re.sub(rf"\b{setting}: bool = False", f"{setting}: bool", text),
    }
    return "".join(f"@overload\ndef {name}({given}) -> {r}: ...\n" for r, given in forms.items())


def types(function: Any) -> dict[str, Any]:
    given = inspect.signature(function).parameters.items()
    return {n: p.annotation for n, p in given if p.annotation is not p.empty}


def module(name: str, made: Any) -> str:
    """A class with the constructor and the forward that are its own, and the settings that its base lacks."""
    (base,) = made.__bases__
    alone = base is torch.nn.Module
    loss = inspect.getclosurevars(made.forward).nonlocals.get("_function", made.forward)
    lines = []
    if "__init__" in vars(made):
        theirs = {} if alone else inspect.signature(base.__init__).parameters
        given = types(loss) | ({} if alone else types(base.__init__))
        signature = inspect.signature(made.__init__)
        for p in signature.parameters.values():
            if p.name not in (*theirs, "self") and p.kind is not p.VAR_KEYWORD:
                lines.append(f"{p.name}: {annotation(given.get(p.name, p.annotation))}")
        lines.append(f"def __init__({parameters(signature, given)}) -> None: ...")
    returns = annotation(inspect.signature(loss).return_annotation)
    given = types(loss) | ({} if alone else types(base.forward))
    signature = inspect.signature(vars(made)["forward"])
    lines.append(f"def forward({parameters(signature, given)}) -> {returns}: ...")
    of = "torch.nn.Module" if alone else f"torch.nn.{base.__name__}"
    return f"class {name}({of}):\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


def stub(texts: Iterator[str], *imports: str) -> str:
    body = "\n".join(texts)
    used = [n for n in NAMES if re.search(rf"(?<!\.)\b{n}\b", body)]
    lines = [
        f"from {home} import {', '.join(n for n in used if NAMES[n] == home)}"
        for home in dict.fromkeys(NAMES[n] for n in used)
    ]
    return "\n".join([HEAD, *imports, *lines, "", body])


def face() -> str:
    """Of the package itself: what it has beside losses comes from where it is defined."""
    lines = ["from ._functions import *", "from ._modules import *"]
    for name in sorted({*fusedloss.__all__} - {*FUNCTIONS, *MODULES}):
        found = getattr(fusedloss, name)
        of = "" if isinstance(found, ModuleType) else found.__module__.removeprefix("fusedloss.")
        lines.append(f"from .{of} import {name} as {name}")
    return "\n".join([HEAD, *lines, "", "__version__: str", ""])


def stubs() -> dict[str, str]:
    """The text of each file."""
    functions = (function(n, FUNCTIONS[n]) for n in sorted(FUNCTIONS))
    modules = (module(n, MODULES[n]) for n in sorted(MODULES))
    ours = "from .._modules import *\n    from . import functional as functional"
    found = {
        "_functions.pyi": stub(functions),
        "_modules.pyi": stub(modules, "import torch.nn"),
        "__init__.pyi": face(),
        "functional.pyi": HEAD
        + BESIDE.format(
            ours="from ._functions import *", theirs="torch.nn.functional", errors="assignment"
        ),
        "nn/__init__.pyi": HEAD
        + BESIDE.format(ours=ours, theirs="torch.nn", errors="assignment, no-redef"),
        "nn/functional.pyi": HEAD + "\nfrom ..functional import *\n",
    }
    folders = {n.rpartition(".")[0] for n in SUBMODULES}
    for name in SUBMODULES:
        file = f"nn/{name.replace('.', '/')}{'/__init__' * (name in folders)}.pyi"
        found[file] = f"{HEAD}\nfrom torch.nn.{name} import *\n"
    return found


def main() -> None:
    for name, text in stubs().items():
        (HOME / name).parent.mkdir(parents=True, exist_ok=True)
        (HOME / name).write_text(text)
    paths = [str(HOME / name) for name in stubs()]
    for words in (("format", "--quiet"), ("check", "--fix", "--quiet")):
        subprocess.run([sys.executable, "-m", "ruff", *words, *paths], check=True)


if __name__ == "__main__":
    main()
