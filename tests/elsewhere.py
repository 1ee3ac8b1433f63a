"""A copy of this checkout with kernels of its own: for the library built otherwise, or changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fusedloss.engines.cpu import load

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "g++")
CMAKE = (ROOT / "CMakeLists.txt").read_text()
# The libraries of this machine's capability; small inputs may have one of their own.
PATHS = list(dict.fromkeys(load.path(small) for small in (False, True)))

# What is asked of every loss and of every kernel.
LOSSES = tuple(
    f"tests/losses/test_{subject}.py"
    for subject in ("against_torch", "kernels", "means", "derivatives", "specials", "bits")
)

# A fork server would import the package of the environment.
START = {"FUSEDLOSS_TEST_START": "fork"}

UNITS = sorted(set(re.findall(r"csrc/\w+\.cpp", CMAKE)))

# An editable install finds the package before sys.path does.
BOOT = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, sys.argv[1] + "/src")
import fusedloss, pytest
assert fusedloss.__file__.startswith(sys.argv[1]), fusedloss.__file__
sys.exit(pytest.main(["-p", "no:cacheprovider", "-n", "0", *sys.argv[2:]]))
"""


def copy(to: Path, kernels: bool = False) -> Path:
    """The sources and tests at `to`; with `kernels`, the libraries of this checkout too."""
    for part in ("src", "csrc", "tests", "docs"):
        shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for file in ("pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / file, to)
    if kernels:
        folder(to).mkdir()
        for path in PATHS:
            shutil.copy(path, folder(to))
    return to


def folder(root: Path) -> Path:
    return root / "src/fusedloss/engines/cpu/lib"


def flags(library: Path = PATHS[0]) -> list[str]:
    """How CMakeLists.txt builds this library, but for the optimisation."""
    found = re.search(r"PRIVATE -O2 \$\{arch\}(.+?)\)", CMAKE, re.DOTALL)
    arch = re.search(rf'"{library.stem.removeprefix("libfusedloss_")}:([^"]*)"', CMAKE)
    assert found and arch
    return ["-std=c++20", *arch[1].split(), *found[1].split()]


def print_formulas(root: Path) -> None:
    """Prints what the kernels include and their formulas' units, into a folder of its own for -I."""
    headers, package = root / "formulas", root / "src/fusedloss"
    headers.mkdir(exist_ok=True)
    sources = sorted((package / "losses").glob("[a-z]*.py"))
    subprocess.run(
        [sys.executable, package / "engines/cpu/printer.py", headers, *sources], check=True
    )
    printed = {
        "args.h": ["engines/abi.py"],
        "reductions.h": ["engines/cpu/reductions.py", *sources],
    }
    for name, (script, *arguments) in printed.items():
        with (headers / name).open("w") as header:
            command = [sys.executable, package / script, *arguments]
            subprocess.run(command, stdout=header, check=True)


def link(root: Path, sources: Sequence[str], to: Path, *extra: str, compiler: str = CXX) -> None:
    units = [*(root / s for s in sources), *(root / "formulas").glob("formulas_*.cpp")]
    folders = [f"-I{root / name}" for name in ("formulas", "csrc")]
    command = [compiler, *extra, *folders, "-o", to, *units]
    subprocess.run(command, check=True)


def build(root: Path, *extra: str) -> None:
    """The libraries of this machine's capability."""
    folder(root).mkdir(exist_ok=True)
    print_formulas(root)
    for path in PATHS:
        to = folder(root) / path.name
        link(root, UNITS, to, *flags(path), *extra, "-fPIC", "-shared")


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300
    )


def pytest_there(
    root: Path, arguments: Sequence[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BOOT, str(root), *arguments],
        cwd=root,
        env={**os.environ, **START, **(environment or {})},
        capture_output=True,
        text=True,
    )
