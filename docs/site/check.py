"""Looks at the guide as it was built: `python docs/site/check.py [FOLDER] [--shots FOLDER PAGE ...]`.

Links, pictures and formulas of every page; and, where there is a Chromium, each page in it, light and dark,
wide and narrow: what it logs, what it cannot load, what runs out of the window, and whether search finds.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import re
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent))

import browser
from browser import Browser

NARROW, WIDE = 390, 1280
LOOKS = [(width, dark) for width in (WIDE, NARROW) for dark in (False, True)]
SOUGHT = {"": "cross_entropy", "zh/": "交叉熵"}
UNRENDERED = r"\$\$|:math:|:func:|\{\{ |\*\*\S|\S\*\*"


class Page(HTMLParser):
    """What a page refers to, and what it can be referred to by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.formulas = 0
        self.faults: list[str] = []
        self._math = self._code = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {v for k, v in attrs if k in ("id", "name") and v}
        for key in ("href", "src"):
            if link := given.get(key):
                self.links.append(link)
        if tag == "img" and not given.get("alt"):
            self.faults.append(f"a picture without words: {given.get('src')}")
        if tag == "math":
            self.formulas += 1
            self._math += 1
        self._code += tag in ("pre", "code")
        if tag == "merror":
            self.faults.append("a formula with an error")

    def handle_endtag(self, tag: str) -> None:
        self._math -= tag == "math"
        self._code -= tag in ("pre", "code")

    def handle_data(self, data: str) -> None:
        if self._math and "\\" in data:
            self.faults.append(f"a formula with LaTeX in it: {data!r}")
        if not self._code and re.search(UNRENDERED, data):
            self.faults.append(f"what was not rendered: {data.strip()[:60]!r}")


def written(root: Path) -> Iterator[str]:
    """The faults of the files alone."""
    pages = {p: Page(p.read_text()) for p in sorted(root.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(root)
        yield from (f"{name}: {fault}" for fault in page.faults)
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{name}: {link} leads nowhere"
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].names
            ):
                yield f"{name}: {link} names no place"
    if not any(page.formulas for page in pages.values()):
        yield "no page has a formula"


WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"
BROKEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
FLAT = """[...document.querySelectorAll('math')].filter(m => m.checkVisibility())
  .filter(m => !m.getBoundingClientRect().height).length"""
FAINT = """(() => {
  const ground = getComputedStyle(document.body).backgroundColor;
  return [...document.querySelectorAll('.plot .curve')]
    .filter(c => getComputedStyle(c).stroke === ground || getComputedStyle(c).stroke === 'none').length;
})()"""
FOUND = """new Promise(done => {
  let left = 100;
  const look = () => document.querySelector('#search-results li a') ? done(true)
    : left-- ? setTimeout(look, 50) : done(false);
  look();
})"""


def logged(opened: Browser) -> Iterator[str]:
    for event in opened.events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            yield f"an exception: {params['exceptionDetails'].get('text')}"
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            yield f"the console: {params['args'][0].get('value')}"
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            yield f"the log: {params['entry']['text']} {params['entry'].get('url', '')}"
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("http://127.0.0.1", "data:")):
                yield f"a request to elsewhere: {url}"


def looked_at(opened: Browser, root: Path, home: str) -> Iterator[str]:
    """The faults that show in a browser."""
    for path in sorted(root.rglob("*.html")):
        name = str(path.relative_to(root))
        opened.look(WIDE, False)
        opened.open(f"{home}/{name}")
        yield from (f"{name}: {what}" for what in logged(opened))
        for width, dark in LOOKS:
            opened.look(width, dark)
            scheme = f"{width} wide, {'dark' if dark else 'light'}"
            wide, window = opened.run(WIDTHS)
            if wide > window:
                yield f"{name}: {scheme}: {wide} pixels in a window of {window}"
            if faint := opened.run(FAINT):
                yield f"{name}: {scheme}: {faint} curves cannot be seen"
        yield from (f"{name}: {src} is no picture" for src in opened.run(BROKEN))
        if flat := opened.run(FLAT):
            yield f"{name}: {flat} formulas have no height"
    for folder, sought in SOUGHT.items():
        opened.open(f"{home}/{folder}search.html?q={sought}")
        if not opened.run(FOUND):
            yield f"{folder}search.html: {sought} is not found"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def serve(root: Path) -> str:
    handler = functools.partial(Quiet, directory=str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def shoot(root: Path, to: Path, names: list[str]) -> None:
    """Pictures of pages, for eyes."""
    program = browser.found()
    assert program, "there is no Chromium"
    to.mkdir(parents=True, exist_ok=True)
    with Browser(program) as opened:
        home = serve(root)
        for name in names:
            opened.open(f"{home}/{name}.html")
            for width, dark in LOOKS:
                opened.look(width, dark)
                height = min(int(opened.run("document.documentElement.scrollHeight")), 3000)
                kind = f"{width}-{'dark' if dark else 'light'}"
                opened.shoot(to / f"{name.replace('/', '-')}-{kind}.png", height)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", nargs="?", default="build/docs/html", type=Path)
    arguments.add_argument("--shots", nargs="+", metavar="FOLDER PAGE")
    given = arguments.parse_args()
    root = given.folder.resolve()
    if given.shots:
        to, *names = given.shots
        return shoot(root, Path(to), names)
    faults = list(written(root))
    if program := browser.found():
        with Browser(program) as opened:
            faults += looked_at(opened, root, serve(root))
    else:
        print("docs: there is no Chromium, so that pages were read and not looked at")
    for fault in faults:
        print(f"docs: {fault}")
    print(f"docs: {len(list(root.rglob('*.html')))} pages, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
