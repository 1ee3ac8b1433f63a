"""The page of a loss, of both its sources: what is written by hand, and what the library knows."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from functools import cache

import curves
import facts
import plots
import sources
from facts import Argument, Facts
from sources import GUIDE, Malformed, Source
from words import COMMON_ZH, FAMILIES, SHAPES_ZH, WORDS, family

from fusedloss.cli.bench.tables import clock, figures

LEGACY = ("size_average", "reduce")
DASH = "–"
STACKED = (
    "```{rst-class} stacked\n```\n"  # a table whose rows are paragraphs where there is no room
)


def loss(name: str, language: str) -> str:
    """The page's Markdown."""
    known, own, words = facts.of(name), sources.of_loss(name, language), WORDS[language]
    plot = plots.figure(curves.PLOTS[name], words["value"], words["slope"])
    parts = [
        f"# {name}",
        own.lead,
        _about(known, own, language),
        *_section(language, own, "use"),
        *_section(language, own, "not"),
        f"## {words['formula']}",
        _formula(known, own, language),
        f"```{{raw}} html\n{plot}\n```",
        f"## {words['parameters']}",
        _parameters(known, own, language),
        *_section(language, own, "example"),
        *_section(language, own, "pitfalls"),
        f"## {words['errors']}",
        _errors(known, language),
        f"## {words['numerics']}",
        _digits(known, language),
        f"## {words['speed']}",
        _times(known, language),
        f"## {words['related']}",
        _related(own, language),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(language: str, own: Source, key: str) -> list[str]:
    return [f"## {sources.HEADINGS[language][key]}", own.sections[key]]


def _about(known: Facts, own: Source, language: str) -> str:
    words = WORDS[language]
    parts = [f"{words['family']}[{family(own.family, language)}](index.md)"]
    if known.module:
        parts.append(f"{words['module']}`fusedloss.nn.{known.module}`")
    parts.append(f"[{words['theirs']}]({known.namesake})" if known.namesake else words["alone"])
    parts.append(f"[{words['reference']}](#{known.reference})")
    return "```{rst-class} about\n```\n" + " · ".join(parts)


# Docstrings are reStructuredText; pages are Markdown.


def markdown(text: str) -> str:
    def display(match: re.Match[str]) -> str:
        lines = [line.strip() for line in match[1].strip().splitlines()]
        return "$$\n" + "\n".join(lines) + "\n$$\n"

    text = re.sub(r"^\.\. math::\n((?:[ ]+.*\n?|\n)+)", display, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", lambda m: f"${' '.join(m[1].split())}$", text)
    text = re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", text)
    text = re.sub(r":(?:func|class):`([\w.]+)`", lambda m: _reference(m[1]), text)
    return re.sub(
        r"(?<![<(\[])(https?://[^\s;,)]+)", r"<\1>", text.replace("(https", "( https")
    ).replace("( <", "(<")


def _reference(target: str) -> str:
    name = target.removeprefix("fusedloss.functional.")
    return f"[`{name}`]({name}.md)" if name in facts.names() else f"`{target}`"


def formulas(known: Facts) -> list[str]:
    """The displayed ones of the docstring, or else those in its lines that say what the loss is."""
    text = known.text + "\n"
    found = re.findall(r"^\.\. math::\n((?:[ ]+.*\n|\n)+)", text, re.MULTILINE)
    found = found or re.findall(r":math:`(\\ell =[^`]+|\\log[^`]+)`", text)
    return [" ".join(each.split()) for each in found]


def _formula(known: Facts, own: Source, language: str) -> str:
    every = formulas(known)
    if language == "en":
        text = markdown(known.text)
        return text if "$$" in text else f"$$\n{every[0]}\n$$\n\n{text}"

    def shown(match: re.Match[str]) -> str:
        return f"$$\n{every[int(match[1] or 1) - 1]}\n$$"

    text, places = re.subn(
        r"^\{\{ formula ?(\d*) \}\}$", shown, own.sections["formula"], flags=re.M
    )
    if not places:
        raise Malformed(f"losses/{known.name}.zh.md: its formula is nowhere")
    return text


def table(columns: str, rows: Iterable[Sequence[str]], left: int = 1) -> str:
    heads = columns.split(" | ")
    marks = ["---"] * left + ["--:"] * (len(heads) - left)
    lines = [heads, marks, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """Bars end cells, in formulas too."""
    parts = re.split(r"(\$[^$]+\$)", text)
    parts[1::2] = [
        re.sub(r"(?<!\\)\|", r"\\vert ", p.replace(r"\|", r"\Vert ")) for p in parts[1::2]
    ]
    parts[::2] = [re.sub(r"(?<!\\)\|", r"\\|", p) for p in parts[::2]]
    return "".join(parts)


def _parameters(known: Facts, own: Source, language: str) -> str:
    words, rows = WORDS[language], []
    for argument in known.arguments:
        if argument.name in LEGACY:
            continue
        kind = argument.kind.replace(" | ", {"en": " or ", "zh": " 或 "}[language])
        default = f"`{argument.default}`" if argument.default else words["required"]
        ours = f" *({words['ours']})*" if argument.ours else ""
        meaning = _meaning(argument, known, own, language) + ours
        shape = (
            SHAPES_ZH.get(argument.shape, argument.shape) if language == "zh" else argument.shape
        )
        shape = f"`{shape}`" if "(" in shape else shape or DASH
        rows.append([f"`{argument.name}`", kind, default, shape, _cell(meaning)])
    text = STACKED + table(words["columns"], rows, left=5)
    if any(a.name in LEGACY for a in known.arguments):
        text += f"\n\n{words['legacy']}"
    return text + (f"\n\n{words['returns']}{markdown(known.returns)}" if language == "en" else "")


def _meaning(argument: Argument, known: Facts, own: Source, language: str) -> str:
    if language == "en":
        return markdown(argument.text)
    said = own.parameters.get(argument.name) or COMMON_ZH.get(argument.name)
    if not said:
        raise Malformed(f"losses/{known.name}.zh.md: it does not say what `{argument.name}` is")
    return said


@cache
def phrases() -> dict[str, str]:
    """What errors and rules are called in Chinese, by the docstrings' words; `{}`: the argument before them."""
    found: dict[str, str] = json.loads((GUIDE / "phrases.zh.json").read_text())
    return found


def said(phrase: str, language: str) -> str:
    if language == "en":
        return markdown(phrase)
    first = re.match(r"`(\w+)`", phrase)
    for key in (phrase, re.sub(r"^`\w+`", "`{}`", phrase)):
        if key in phrases():
            return phrases()[key].format(first[1] if first else "")
    raise Malformed(f"phrases.zh.json: it lacks {phrase!r}")


def _errors(known: Facts, language: str) -> str:
    stop, colon = ("; ", ": ") if language == "en" else ("；", "：")
    lines = []
    for kind, whats in known.raises:
        words = stop.join(said(what, language) for what in whats)
        lines.append(f"- `{kind}`{colon}{words}")
    text = "\n".join(lines)
    if known.rules:
        rules = "\n".join(f"- {said(rule, language)}" for rule in known.rules)
        text += f"\n\n{WORDS[language]['strict']}\n\n{rules}"
    return text


def _digits(known: Facts, language: str) -> str:
    words = WORDS[language]
    if known.name in facts.MODULES_ALONE:
        return words["by"].format(name=facts.MODULES_ALONE[known.name])
    if not known.digits:
        return words["undigitized"].format(name=known.name)
    by: dict[tuple[str, str], list[str]] = {}
    for d in known.digits:
        by.setdefault((d.row, d.dtype), []).extend(
            [_greatest(d.kernels), d.bound, _greatest(d.torch)]
        )
    rows = []
    for (row, dtype), cells in by.items():
        variant = row.partition("[")[2].rstrip("]")
        rows.append([f"{dtype}, {variant}" if variant else dtype, *cells])
    return f"{words['digits'].format(name=known.name)}\n\n{table(words['digits_columns'], rows)}"


def _greatest(cell: str) -> str:
    return cell.partition(" (")[0]


def _times(known: Facts, language: str) -> str:
    words = WORDS[language]
    if known.name == "linear_cross_entropy":
        return _heads(language)
    if known.name in facts.MODULES_ALONE:
        return words["by"].format(name=facts.MODULES_ALONE[known.name])
    if not known.times:
        return words["untimed"]
    rows, origins = [], {}
    for result, source, machine in known.times:
        origins[source] = machine
        ratios = [result.ratio(variant, "ours") for variant in ("eager", "compile")]
        memory = [result.excess(variant) for variant in ("ours", "eager")]
        rows.append(
            [
                result.case.title,
                clock(result.median("ours")),
                *(DASH if r is None else figures(r) for r in ratios),
                *(DASH if m is None else f"{m:.1f}" for m in memory),
            ]
        )
    text = words["times"].format(name=known.name)
    return f"{text}\n\n{table(words['times_columns'], rows)}\n\n{_raw(origins, language)}"


def _raw(origins: dict[str, str], language: str) -> str:
    found = "; ".join(
        f"`benchmarks/results/{file}` ({machine})" for file, machine in origins.items()
    )
    return WORDS[language]["raw"] + found


def _heads(language: str) -> str:
    words, rows, origins = WORDS[language], [], {}
    for head in facts.heads():
        origins[head.source] = head.machine
        medians = {v: statistics.median(s) for v, s in head.samples.items()}
        memory = [(head.peaks[v] - head.gradient_bytes) / 2**20 for v in ("ours", "eager")]
        rows.append(
            [
                head.title,
                figures(medians["ours"] / medians["products"]),
                figures(medians["eager"] / medians["ours"]),
                *(f"{m:.0f}" for m in memory),
            ]
        )
    return f"{words['heads']}\n\n{table(words['heads_columns'], rows)}\n\n{_raw(origins, language)}"


def _related(own: Source, language: str) -> str:
    return "\n".join(
        f"- [`{name}`]({name}.md): {sources.of_loss(name, language).lead}" for name in own.related
    )


def index(language: str) -> str:
    """The losses by family."""
    words = WORDS[language]
    parts = [f"# {words['losses']}", words["losses_lead"]]
    for key in FAMILIES:
        names = [n for n in facts.names() if sources.of_loss(n, language).family == key]
        rows = []
        for n in names:
            module = facts.of(n).module
            lead = sources.of_loss(n, language).lead
            rows.append([f"[`{n}`]({n}.md)", f"`{module}`" if module else DASH, _cell(lead)])
        title = family(key, language)
        tree = "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *names, "```"])
        parts += [f"## {title}", STACKED + table(words["losses_columns"], rows, left=3), tree]
    return "\n\n".join(parts) + "\n"
