"""The guide: its examples print what they say, and every loss has its pages in both languages."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import elsewhere
import pytest

sys.path.insert(0, str(elsewhere.ROOT / "docs/site"))

import curves
import examples
import facts
import pages
import plots
import sources
from words import FAMILIES, LANGUAGES

from fusedloss.front.definition import REGISTRY
from fusedloss.front.loss import FUNCTIONS
from fusedloss.front.modules import MODULES

PAGES = sorted(p for p in sources.GUIDE.rglob("*.md") if not p.stem.endswith(".zh"))
READMES = [elsewhere.ROOT / name for name in ("README.md", "README.zh-CN.md")]
MOST_LINES = 80

each_loss = pytest.mark.parametrize("name", facts.names())
each_language = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture(autouse=True)
def _losses_of_examples_go_again() -> Iterator[None]:
    kept = [(each, dict(each)) for each in (REGISTRY, FUNCTIONS, MODULES)]
    yield
    for each, before in kept:
        each.clear()
        each.update(before)


@pytest.mark.parametrize(
    "page", [*PAGES, *READMES], ids=lambda p: str(p.relative_to(elsewhere.ROOT))
)
def test_examples_print_what_they_say(page: Path) -> None:
    """Both languages show the blocks of the English page."""
    assert not examples.failures(page)


@each_loss
@each_language
def test_loss_has_its_page(name: str, language: str) -> None:
    """With every parameter, error and rule in the language, and the formulas of its docstring."""
    text = pages.loss(name, language)
    own = sources.of_loss(name, language)
    assert own.family in FAMILIES and set(own.related) <= set(facts.names()) - {name}
    assert "```pycon" in text and "$$" in text
    assert len(own.sections["pitfalls"]) > 100
    assert language == "en" or len(re.findall(r"[\u4e00-\u9fff]", text)) > 300


@each_loss
def test_picture_is_of_the_loss(name: str) -> None:
    """Its slope is the value's difference quotient, wherever both sides have one slope."""
    values, slopes = plots.sampled(curves.PLOTS[name])
    for value, slope in zip(values, slopes, strict=True):
        close = 0
        for k in range(1, len(value.x) - 1):
            quotient = (value.y[k + 1] - value.y[k - 1]) / (value.x[k + 1] - value.x[k - 1])
            close += abs(quotient - slope.y[k]) <= 1e-2 * (1 + abs(slope.y[k]))
        assert close > 0.9 * (len(value.x) - 2)


def test_pages_of_no_loss() -> None:
    named = {p.stem.removesuffix(".zh") for p in (sources.GUIDE / "losses").iterdir()}
    assert named == set(facts.names())


def test_every_page_is_in_both_languages() -> None:
    for page in PAGES:
        name = str(page.relative_to(sources.GUIDE).with_suffix(""))
        assert sources.text(name, "zh")


def test_which_loss_leads_to_every_one() -> None:
    for language in LANGUAGES:
        text = sources.text("which-loss", language)
        assert set(facts.names()) <= set(re.findall(r"losses/(\w+)\.md", text))


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_readme_is_short(readme: Path) -> None:
    assert len(readme.read_text().splitlines()) <= MOST_LINES
