"""A copy of this checkout with kernels of its own: for the library built otherwise, or changed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fusedloss.cpu import load

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "g++")
CMAKE = (ROOT / "CMakeLists.txt").read_text()

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
    """The sources and tests at `to`; with `kernels`, the library of this checkout too."""
    for part in ("src", "csrc", "tests"):
        shutil.copytree(ROOT / part, to / part, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    shutil.copy(ROOT / "pyproject.toml", to)
    if kernels:
        library(to).parent.mkdir()
        shutil.copy(load.path(), library(to))
    return to


def library(root: Path) -> Path:
    return root / "src/fusedloss/cpu/lib" / load.path().name


def flags() -> list[str]:
    """How CMakeLists.txt builds the kernels for this machine, but for the optimisation."""
    found = re.search(r"PRIVATE -O3 \$\{arch\}(.+?)\)", CMAKE, re.DOTALL)
    arch = re.search(rf'"{load.capability()}:([^"]*)"', CMAKE)
    assert found and arch
    return ["-std=c++20", *arch[1].split(), *found[1].split()]


def print_formulas(root: Path) -> None:
    """Prints the header that the kernels include, into a folder of its own for -I."""
    folder = root / "formulas"
    folder.mkdir(exist_ok=True)
    sources = sorted((root / "src/fusedloss/losses").glob("[a-z]*.py"))
    printer = root / "src/fusedloss/cpu/printer.py"
    with (folder / "formulas.h").open("w") as header:
        subprocess.run([sys.executable, printer, *sources], stdout=header, check=True)


def link(root: Path, source: str, to: Path, *extra: str) -> None:
    command = [CXX, *flags(), *extra, f"-I{root / 'formulas'}", "-o", to, root / source]
    subprocess.run(command, check=True)


def build(root: Path, *extra: str) -> None:
    """The library of this machine's capability."""
    library(root).parent.mkdir(exist_ok=True)
    print_formulas(root)
    link(root, "csrc/kernels.cpp", library(root), "-fPIC", "-shared", *extra)


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )


def pytest_there(
    root: Path, arguments: Sequence[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BOOT, str(root), *arguments],
        cwd=root,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
