"""Arguments that more than one subcommand takes, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import fusedloss  # noqa: F401  (fills the registry)

from ..front.definition import REGISTRY


class UsageError(ValueError):
    """One line for the user; the exit code is 2."""


def plain_name(name: str) -> str:
    """`mse`, `mse_loss` and `MSELoss` name the same."""
    return name.lower().replace("_", "").removesuffix("loss")


def chosen_losses(words: Sequence[str] | None, valid: Sequence[str]) -> tuple[str, ...]:
    """Those of the `valid` registry rows; a name means all its variants."""
    found: dict[str, None] = {}
    for word in words or ():
        keys = [
            key
            for key in valid
            if plain_name(word)
            in map(plain_name, (key, REGISTRY[key].name, REGISTRY[key].module or key))
        ]
        if not keys:
            raise UsageError(f"--only: must be among {', '.join(valid)}, got {word!r}")
        found.update(dict.fromkeys(keys))
    return tuple(valid if words is None else found)


def among(option: str, words: Sequence[str] | None, valid: Sequence[str]) -> tuple[str, ...] | None:
    for word in words or ():
        if word not in valid:
            raise UsageError(f"{option}: must be among {', '.join(valid)}, got {word!r}")
    return None if words is None else tuple(v for v in valid if v in words)


def chosen_threads(word: str | None) -> int:
    if word is None:
        return torch.get_num_threads()
    if not word.isdecimal() or not 1 <= int(word) <= 4096:
        raise UsageError(f"--threads: must be an integer from 1 to 4096, got {word!r}")
    return int(word)


def check_picture(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--picture: must end in .svg or .png, got {str(path)!r}")
    check_writable("--picture", path)


def check_writable(option: str, path: Path) -> None:
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(
            f"{option}: must be a file that can be written, got {str(path)!r} ({error.strerror})"
        ) from None
    if not existed:
        path.unlink()
