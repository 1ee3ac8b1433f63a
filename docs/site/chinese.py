"""Search in Chinese: a text without spaces is indexed by its pairs of characters, and so is what is sought."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish

RUNS = re.compile(r"[\u4e00-\u9fff]+|\w+", re.ASCII)


def pairs(run: str) -> list[str]:
    return [run[k : k + 2] for k in range(len(run) - 1)] or [run]


class SearchPairs(SearchEnglish):
    lang = "zh"
    language_name = "English"  # whose stemmer it takes
    js_splitter_code = r"""
var splitQuery = (query) =>
  (query.match(/[\u4e00-\u9fff]+|\w+/g) || []).flatMap((run) =>
    !/[\u4e00-\u9fff]/.test(run) || run.length < 2
      ? [run]
      : Array.from({ length: run.length - 1 }, (_, k) => run.slice(k, k + 2)));
"""

    def split(self, input: str) -> list[str]:
        found = []
        for run in RUNS.findall(input):
            found += [run] if run.isascii() else pairs(run)
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_search_language(SearchPairs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
