"""Formulas as MathML, made at build time: browsers draw it without a script."""

from __future__ import annotations

import re
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

# After the name of a function that no bracket follows there is room.
NAMED = re.compile(r"(<mi>(?:log|exp|cos|max|min|tanh)</mi>)(?=<m(?:i|sub|sup|subsup|row)>(?!<mo))")
BAR = '<mo stretchy="false">&#x0007C;</mo>'  # of an absolute value: no operator between two
logger = logging.getLogger(__name__)


def mathml(node: Any, display: str) -> str:
    latex = node.astext().strip()
    made = convert(latex, display=display)
    if "\\" in made or "merror" in made:
        logger.warning("a formula that MathML does not have: %s", latex, location=node)
    made = made.replace(BAR, BAR.replace("<mo", '<mo lspace="0" rspace="0"'))
    return NAMED.sub(r'\1<mspace width="0.167em"/>', made)


def inline(self: Any, node: Any) -> None:
    self.body.append(mathml(node, "inline"))
    raise SkipNode


def block(self: Any, node: Any) -> None:
    self.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
