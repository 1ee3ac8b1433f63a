"""Builds the guide: `python docs/site [FOLDER]`, English and, below zh/, Chinese.

Pages are put together in FOLDER/source first: those of losses from what the library knows and from
docs/guide/losses, the others from docs/guide and docs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import facts
import pages
import sources
from words import LANGUAGES, WORDS

from fusedloss.front.loss import FUNCTIONS
from fusedloss.front.modules import MODULES

DOCS = HERE.parent
START = ("install", "which-loss")
TUTORIALS = (
    "replace-torch-nn",
    "large-vocabularies",
    "distillation",
    "metric-learning",
    "segmentation",
)
# Pages of docs/, which stand on GitHub as well: English, and in Chinese behind a digest of docs/guide.
OF_DOCS = (
    "compatibility",
    "accuracy",
    "performance",
    "lazy-heads",
    "segmentation",
    "distributed",
    "models",
)
PICTURES = ("accuracy.png", "linear-memory.svg", "speed.svg")
MODULE = "fusedloss"
FACE = (
    "explain",
    "checks",
    "patch",
    "patched",
    "unpatch",
    "lazy_heads",
    "lazy_head",
    "synchronize",
    "distributed.count",
)


def found_of_docs() -> list[str]:
    return [name for name in OF_DOCS if (DOCS / f"{name}.md").exists()]


def tutorials() -> list[str]:
    """In their order, and those that are new behind them."""
    found = [
        f.stem for f in sorted((sources.GUIDE / "tutorials").glob("*.md")) if "." not in f.stem
    ]
    ordered = [*(n for n in TUTORIALS if n in found), *(n for n in found if n not in TUTORIALS)]
    return [f"tutorials/{name}" for name in ordered]


def toctree(caption: str, names: list[str]) -> str:
    lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"]
    return "\n".join(lines)


def front(language: str) -> str:
    """The first page, and what the sidebar lists."""
    words = WORDS[language]
    trees = [
        toctree(words["start"], list(START)),
        toctree(words["by_family"], ["losses/index"]),
        toctree(words["tutorials"], tutorials()),
        toctree(words["more"], ["api", *found_of_docs()]),
    ]
    return "\n\n".join([sources.text("index", language), *trees]) + "\n"


def of_docs(name: str, language: str) -> str:
    text = (DOCS / f"{name}.md").read_text()
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text).replace("](guide/", "](")
    if language == "en":
        return text
    below = re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)
    return f"{sources.text(name, language)}\n\n{below}"


def reference(language: str) -> str:
    """From the docstrings, which are English."""
    words = WORDS[language]
    title = words["api"]
    parts = [title, "=" * 2 * len(title), ""]
    for name in sorted(FUNCTIONS):
        parts.append(f".. autofunction:: fusedloss.functional.{name}\n")
    for name in FACE:
        kind = "class" if name in ("checks", "patched") else "function"
        parts.append(f".. auto{kind}:: {MODULE}.{name}\n")
    for name in sorted(MODULES):
        parts.append(f".. autoclass:: fusedloss.nn.{name}\n   :show-inheritance:\n")
    return "\n".join(parts)


def write(source: Path, language: str) -> None:
    """The tree of a language's pages."""
    made = {f"losses/{name}.md": pages.loss(name, language) for name in facts.names()}
    made["losses/index.md"] = pages.index(language)
    made["index.md"] = front(language)
    made["api.rst"] = reference(language)
    for name in (*START, *tutorials()):
        made[f"{name}.md"] = sources.text(name, language)
    for name in found_of_docs():
        made[f"{name}.md"] = of_docs(name, language)
    for name, text in made.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    for picture in PICTURES:
        shutil.copy(DOCS / picture, source)


def build(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    running = []
    for language in LANGUAGES:
        source = folder / "source" / language
        source.mkdir(parents=True)
        write(source, language)
        to = folder / "made" / language
        command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
        command += [
            "-c",
            str(HERE),
            "-d",
            str(folder / "doctrees" / language),
            str(source),
            str(to),
        ]
        environment = {**os.environ, "FUSEDLOSS_DOCS_LANGUAGE": language}
        running.append(subprocess.Popen(command, env=environment))
    ends = [process.wait() for process in running]
    if any(ends):
        sys.exit("docs: Sphinx found what it names above")
    html = folder / "html"
    shutil.move(folder / "made" / "en", html)
    shutil.move(folder / "made" / "zh", html / "zh")


def main() -> None:
    began = time.monotonic()
    folder = Path(sys.argv[1] if sys.argv[1:] else "build/docs").resolve()
    build(folder)
    print(f"docs: {folder / 'html' / 'index.html'}, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
