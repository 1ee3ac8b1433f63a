"""Keeps apart what torch.compile caches on disk: of patched and plain functions, and of our versions."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import torch.compiler.config

CONFIG = torch.compiler.config
KEY = "cache_key_tag"


@functools.cache
def version() -> str:
    """A digest of our sources: what a compiled graph remembers of them must not outlive them."""
    home, found = Path(__file__).parent.parent, hashlib.sha256()
    # Of strings: objects for paths take several times as long, at each import.
    for folder, folders, files in os.walk(home):
        folders[:] = sorted({*folders} - {"cli", "__pycache__"})
        for name in sorted(n for n in files if n.endswith(".py")):
            path = f"{folder}/{name}"
            with open(path, "rb") as source:  # noqa: PTH123
                found.update(path[len(str(home)) :].encode() + b"\0" + source.read() + b"\0")
    return found.hexdigest()[:12]


def own() -> str:
    """The mark."""
    return f"+fusedloss-{version()}"


def _marked(config: Any) -> str:
    """What the user has set, whenever and in whichever thread, and our mark."""
    return _unmarked(config.__getattr__(KEY)) + own()


def _unmarked(found: str) -> str:
    return found.replace(own(), "")


def mark() -> None:
    """From here on cached graphs are those of patched functions alone.

    The graph that a cache looks up holds the name of PyTorch's function, not what it does. torch keeps
    its settings by thread, and users set them: so the mark is added where the tag is read, by a property
    of the settings' class.
    """
    setattr(type(CONFIG), KEY, property(_marked))


def unmark() -> None:
    """The tag is read as the user has set it."""
    if KEY in vars(type(CONFIG)):
        delattr(type(CONFIG), KEY)
    # Whoever saves the tag and puts it back, as mocks do, has stored the mark too.
    tag = getattr(CONFIG, KEY)
    if own() in tag:
        setattr(CONFIG, KEY, _unmarked(tag))
