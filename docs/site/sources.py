"""The hand-written part of the guide: NAME.md and NAME.zh.md beside each other, with one set of examples."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from words import HEADINGS

GUIDE = Path(__file__).parents[1] / "guide"
BLOCK = re.compile(r"^```pycon\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHINESE = r"[\u4e00-\u9fff\u3001\u3002\uff00-\uffef]"
SOFT_BREAK = re.compile(rf"(?<={CHINESE})\n(?:  )?(?={CHINESE})")  # which browsers show as a space
PLACE = re.compile(r"^```\{example\} (\d+)\n```$", re.MULTILINE)


class Malformed(ValueError):
    """A page that lacks something; the message names the file."""


def path(name: str, language: str) -> Path:
    return GUIDE / (f"{name}.md" if language == "en" else f"{name}.{language}.md")


def examples(name: str) -> list[str]:
    """The blocks of a page, which both languages show."""
    file = path(name, "en")
    return BLOCK.findall(file.read_text()) if file.exists() else []


def text(name: str, language: str) -> str:
    """A page's source with its examples."""
    file = path(name, language)
    if not file.exists():
        raise Malformed(f"{file}: there is no such page")
    found = file.read_text()
    if language == "en":
        return found
    blocks, places = examples(name), [int(k) for k in PLACE.findall(found)]
    if sorted(places) != list(range(1, len(blocks) + 1)):
        raise Malformed(
            f"{file}: its examples are {places}, of {len(blocks)} in {path(name, 'en').name}"
        )
    joined = SOFT_BREAK.sub("", found)
    return PLACE.sub(lambda m: f"```pycon\n{blocks[int(m[1]) - 1]}```", joined)


@dataclass
class Source:
    """The page of a loss: its first lines, what it is for in a sentence, and its sections."""

    family: str
    related: list[str]
    lead: str
    sections: dict[str, str]  # by key
    parameters: dict[str, str]  # in the language's words; empty in English


@cache
def of_loss(name: str, language: str) -> Source:
    file = path(f"losses/{name}", language)
    head, *parts = re.split(r"^## (.+)\n", text(f"losses/{name}", language), flags=re.MULTILINE)
    keys = {heading: key for key, heading in HEADINGS[language].items()}
    found = dict(zip(parts[::2], (body.strip() for body in parts[1::2]), strict=True))
    if unknown := set(found) - set(keys):
        raise Malformed(f"{file}: unknown headings {sorted(unknown)}")
    if missing := set(keys) - set(found):
        raise Malformed(f"{file}: it lacks the headings {sorted(missing)}")
    sections = {keys[heading]: body for heading, body in found.items()}
    said = dict(
        re.findall(r"^(family|related): (.+)\n", path(f"losses/{name}", "en").read_text(), re.M)
    )
    lead = re.sub(r"\A---\n.*?^---\n", "", head, flags=re.DOTALL | re.MULTILINE).strip()
    parameters = re.findall(
        r"^- `(\w+)`\uff1a(.*(?:\n  .*)*)", sections.pop("parameters", ""), re.M
    )
    return Source(
        family=said["family"],
        related=said["related"].split(", "),
        lead=lead,
        sections=sections,
        parameters={n: " ".join(words.split()) for n, words in parameters},
    )
