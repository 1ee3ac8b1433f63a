"""Sphinx's configuration, of both languages: FUSEDLOSS_DOCS_LANGUAGE says which."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from words import THEME_ZH, WORDS

import fusedloss

LANGUAGE = os.environ.get("FUSEDLOSS_DOCS_LANGUAGE", "en")
HERE = Path(__file__).parent

project = "fusedloss"
author = "the fusedloss authors"
version = release = fusedloss.__version__
language = {"en": "en", "zh": "zh_CN"}[LANGUAGE]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "chinese",
]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "fusedloss"
html_static_path = [str(HERE / "static")]
templates_path = [str(HERE / "templates")]
html_css_files = ["guide.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/language.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
html_context = {"language_code": LANGUAGE, "other_language": WORDS[LANGUAGE]["other"]}
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style = "default"
pygments_dark_style = "github-dark"
default_role = "code"
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
suppress_warnings = ["config.cache"]


def translate(app: Any) -> None:
    """The theme's own words."""
    templates = app.builder.templates.environment
    theirs = templates.globals["gettext"]

    def gettext(text: str) -> str:
        return THEME_ZH.get(text.strip()) or str(theirs(text))

    templates.globals |= {"_": gettext, "gettext": gettext}


def setup(app: Any) -> None:
    if LANGUAGE == "zh":
        app.config.html_search_language = "zh"
        app.connect("builder-inited", translate)
