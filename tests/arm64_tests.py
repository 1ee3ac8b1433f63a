"""One in fifty of the tests of losses on arm64: under qemu-user, Debian's Python and PyPI's torch for aarch64.

`make arm64-tests` runs it on Debian, with the tools of `make arm64`; what it fetches stays in build/arm64.
Debian's own settings are left alone. Arguments are pytest's.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import arm64
import elsewhere

TORCH, PYTHON = "2.10.0", "3.11"
EVERY = "50"
ROOMS = ("tests/losses",)
TOOLS = (arm64.CXX, arm64.QEMU, "apt-get", "dpkg")
# Debian's: Python, and what it and torch link to.
PACKAGES = [
    *(f"python{PYTHON}{part}" for part in ("", "-minimal")),
    *(f"libpython{PYTHON}-{part}" for part in ("minimal", "stdlib")),
    *("libc6", "libgcc-s1", "libstdc++6", "libgomp1", "zlib1g", "libssl3", "libffi8", "libexpat1"),
    *("libbz2-1.0", "liblzma5", "libsqlite3-0", "libuuid1", "libcrypt1", "libdb5.3"),
    *("libncursesw6", "libtinfo6", "libreadline8"),
]
# What torch requires there, and the tests; pip would ask for what torch requires here.
WHEELS = [
    *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy"),
    *("typing-extensions", "execnet", "expecttest", "hypothesis", "iniconfig", "numpy"),
    *("packaging", "pluggy", "pygments", "pytest", "pytest-xdist", "setuptools"),
    "sortedcontainers",
]
FETCHED = elsewhere.ROOT / "build/arm64"
DEBIAN, SITE = FETCHED / "debian", FETCHED / "site"


def call(*command: str | Path, at: Path | None = None, **options: str) -> None:
    subprocess.run(command, check=True, cwd=at, env={**os.environ, **options})


def debian(folder: Path) -> None:
    """Unpacks the packages; lists and archives are in the folder, and nothing is installed."""
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    settings = folder / "apt.conf"
    settings.write_text(
        f'APT::Architectures {{"amd64"; "arm64";}};\nDir::State::lists "{folder}/lists";\n'
        f'Dir::Cache "{folder}/cache";\nAPT::Sandbox::User "{getpass.getuser()}";\n'
    )
    names = [f"{name}:arm64" for name in PACKAGES]
    for command in (["update"], ["download", *names]):
        call("apt-get", "-qq", *command, at=folder, APT_CONFIG=str(settings))
    DEBIAN.mkdir(parents=True)
    for archive in sorted(folder.glob("*.deb")):
        call("dpkg", "-x", archive, DEBIAN)


def wheels(folder: Path) -> None:
    """Unpacks them, of the versions that constraints.txt says, but for torch."""
    told = (elsewhere.ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(t for t in told if not t.startswith(("torch==", "triton=="))))
    platforms = [f"--platform=manylinux_2_{k}_aarch64" for k in (28, 27, 26, 17)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-c", constraints]
    command += ["--only-binary=:all:", *platforms, "--platform=manylinux2014_aarch64"]
    command += [f"--python-version={PYTHON}", "-d", folder, f"torch=={TORCH}", *WHEELS]
    call(*command)
    for wheel in sorted(folder.glob("*.whl")):
        shutil.unpack_archive(wheel, SITE, "zip")


def fetch() -> None:
    """Once."""
    if (done := FETCHED / "fetched").exists():
        return
    shutil.rmtree(FETCHED, ignore_errors=True)
    for each in (debian, wheels):
        with tempfile.TemporaryDirectory() as folder:
            each(Path(folder))
    done.touch()


def build(root: Path) -> None:
    to = elsewhere.folder(root) / "libfusedloss_default.so"
    to.parent.mkdir(exist_ok=True)
    elsewhere.print_formulas(root)
    extra = "-O2", "-fPIC", "-shared"
    elsewhere.link(root, elsewhere.UNITS, to, *arm64.flags(), *extra, compiler=arm64.CXX)


def run(root: Path, arguments: list[str]) -> int:
    """The tests of a copy; processes that they start are of arm64, too."""
    program = root / "python"
    at = DEBIAN / "usr/bin" / f"python{PYTHON}"
    program.write_text(f'#!/bin/sh\nexec {arm64.QEMU} -L {DEBIAN} {at} "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join(map(str, (root / "src", SITE)))
    given = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    every = {"FUSEDLOSS_TEST_EVERY": os.environ.get("EVERY", EVERY)}
    script = "import sys, pytest; sys.executable = sys.argv.pop(1); sys.exit(pytest.main())"
    # Inductor would want a compiler of arm64.
    command = [
        program,
        "-c",
        script,
        program,
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-k",
        "not inductor",
    ]
    return subprocess.run(
        [*command, *(arguments or ROOMS)], cwd=root, env={**os.environ, **given, **every}
    ).returncode


def main() -> int:
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        print(f"arm64-tests: not run: {', '.join(missing)} not installed", file=sys.stderr)
        return 2
    fetch()
    with tempfile.TemporaryDirectory() as folder:
        root = elsewhere.copy(Path(folder) / "copy")
        build(root)
        return run(root, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
