"""Runs the examples of Markdown pages, as doctest does: `python docs/site/examples.py [--write] FILE ...`.

The blocks of a page are one session. `--write` puts what is printed into the page.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

BLOCK = re.compile(r"(?<=^```pycon\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
FLAGS = doctest.ELLIPSIS


def failures(file: Path) -> list[str]:
    """What is printed otherwise than the page says."""
    found: list[str] = []
    known: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(file.read_text()):
        line = file.read_text().count("\n", 0, block.start())
        test = doctest.DocTestParser().get_doctest(block[0], known, file.name, str(file), line)
        runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
        runner.run(test, out=found.append, clear_globs=False)
        known = test.globs
    return found


def written(text: str) -> str:
    """The page with what its examples print."""
    known: dict[str, Any] = {"__name__": "__main__"}

    def block(match: re.Match[str]) -> str:
        parts = []
        for example in doctest.DocTestParser().get_examples(match[0]):
            first, *more = example.source.splitlines()
            parts += [f">>> {first}", *(f"... {line}".rstrip() for line in more)]
            parts.append(_printed(example.source, known))
        return "\n".join(part for part in parts if part) + "\n"

    return BLOCK.sub(block, text)


def _printed(source: str, known: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(source, "<example>", "single"), known)
        except Exception as error:
            (*_, last) = traceback.format_exception_only(error)
            return f"Traceback (most recent call last):\n    ...\n{last.rstrip()}"
    return out.getvalue().rstrip("\n")


def main() -> None:
    torch.set_num_threads(1)
    write, files = "--write" in sys.argv, [Path(a) for a in sys.argv[1:] if a != "--write"]
    found: list[str] = []
    for file in files:
        if write:
            file.write_text(written(file.read_text()))
        else:
            found += failures(file)
    sys.exit("".join(found))


if __name__ == "__main__":
    main()
