"""Folders in place of site-packages that hold some packages and what they require, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# Without site-packages; what follows -c is run beside the folder.
BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1))\n"


def required(*names: str) -> dict[str, metadata.Distribution]:
    """The distributions of these names and all that they require here."""
    found: dict[str, metadata.Distribution] = {}
    ahead = list(names)
    while ahead:
        name = ahead.pop().lower()
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        every = map(Requirement, found[name].requires or ())
        ahead += [r.name for r in every if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def fill(folder: Path, *names: str) -> Path:
    """Links to the packages and modules of these distributions, and of what they require."""
    folder.mkdir(parents=True, exist_ok=True)
    for distribution in required(*names).values():
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)
    return folder


def python(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script, where nothing can be imported but what is in the folder."""
    command = [sys.executable, "-S", "-c", BOOT + script, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
