"""The docstring of a public loss: what its definition says, and what follows from the rest."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .settings import Setting

WIDTH = 104
# The lines of an item: textwrap takes many times as long, at each import.
FIRST, FURTHER = (re.compile(rf"\S.{{0,{WIDTH - indent - 1}}}(?!\S)|\S+") for indent in (4, 8))
URL = "https://docs.pytorch.org/docs/stable/generated/torch.nn"
COMMON = {
    "size_average": "deprecated, overrides `reduction`.",
    "reduce": "deprecated, overrides `reduction`.",
    "reduction": "'none', 'mean' or 'sum'.",
    "denominator": "what 'mean' divides by in place of its own count, a number or a 0-dim tensor: the count "
    "of all processes and all steps of an accumulation, say (:func:`fusedloss.distributed.count`).",
}


class Words(NamedTuple):
    """What a family of losses says: of the result's type, of the errors by exception, of arguments."""

    returns: str
    raises: tuple[str, ...]
    arguments: Mapping[str, str] = {}


def of_function(
    body: Callable[..., object],
    module: str,
    parameters: list[str],
    settings: dict[str, Setting],
    words: Words,
) -> str:
    text, sections = parts_of(inspect.cleandoc(body.__doc__ or ""))
    if module and body.__name__ not in text:
        text += f"\n\nAs :func:`torch.nn.functional.{body.__name__}`\n({URL}.{module}.html)."
    said = {**COMMON, **words.arguments, **items(sections.get("Args", ""))}
    arguments = [f"{n}: {said[n]}" for n in parameters if n in said]
    raised = [s.raises.format(argument=f"`{n}`") for n, s in settings.items()]
    if "denominator" in parameters:
        raised.append("ValueError: `denominator` with another reduction than 'mean'")
    raises = _grouped([*words.raises, *raised, *lines(sections.get("Raises", ""))])
    parts = [text, _section("Args", arguments)]
    parts.append(_section("Returns", [sections.get("Returns") or words.returns]))
    parts.append(_section("Raises", raises))
    return "\n\n".join(parts) + "\n"


def parts_of(doc: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the sections by name."""
    pieces = re.split(r"^(Args|Returns|Raises):\n", doc, flags=re.MULTILINE)
    sections = {
        n: textwrap.dedent(s).strip() for n, s in zip(pieces[1::2], pieces[2::2], strict=True)
    }
    return pieces[0].strip(), sections


def lines(section: str) -> list[str]:
    """One for each item, which may be continued on further lines that are indented."""
    return [" ".join(item.split()) for item in re.split(r"\n(?=\S)", section) if item]


def items(section: str) -> dict[str, str]:
    pairs = (line.split(": ", 1) for line in lines(section))
    return dict(pairs)


def _grouped(raises: list[str]) -> list[str]:
    """One line for each exception."""
    by: dict[str, list[str]] = {}
    for line in raises:
        kind, what = line.split(": ", 1)
        by.setdefault(kind, []).append(what.rstrip("."))
    return [f"{kind}: {'; '.join(dict.fromkeys(whats))}." for kind, whats in by.items()]


def _section(name: str, items: list[str]) -> str:
    lines = [f"{name}:"]
    for item in items:
        text = " ".join(item.split())
        found = FIRST.match(text)
        assert found
        lines.append(f"    {found[0]}")
        lines += [f"        {line}" for line in FURTHER.findall(text, found.end())]
    return "\n".join(lines)
