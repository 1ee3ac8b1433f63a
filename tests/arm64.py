"""The kernels as arm64 compiles them: the driver's random calls of all of them, under qemu-user.

`make arm64` runs it, with qemu-aarch64 and aarch64-linux-gnu-g++ (on Debian `apt install qemu-user
g++-aarch64-linux-gnu`). The same calls run here: what is drawn must be the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import elsewhere

CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVER = "tests/native/driver.cpp"
SEED, CALLS = "1", "2000"


def flags() -> list[str]:
    """As CMakeLists.txt has them for a machine whose capabilities it does not name."""
    library = elsewhere.flags(Path("libfusedloss_default.so"))
    return [f for f in library if not f.startswith(("-march", "-D"))]


def drawn(root: Path, compiler: str, *run: str) -> str:
    """The driver, built and run: where its random numbers end."""
    program = root / f"driver-{Path(compiler).name}"
    extra = "-O2", "-pthread", "-static"
    elsewhere.link(root, [DRIVER, *elsewhere.UNITS], program, *flags(), *extra, compiler=compiler)
    done = subprocess.run(
        [*run, program, SEED, CALLS, "1"], check=True, capture_output=True, text=True
    )
    print(f"{compiler}: {done.stdout.strip()}", flush=True)
    found = re.search(r"drawn (\w+)", done.stdout)
    assert found
    return found[1]


def main() -> int:
    if missing := [tool for tool in (CXX, QEMU) if shutil.which(tool) is None]:
        print(f"arm64: not run: {' and '.join(missing)} not installed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        root = elsewhere.copy(Path(folder) / "copy")
        elsewhere.print_formulas(root)
        here, there = drawn(root, elsewhere.CXX), drawn(root, CXX, QEMU)
        assert here == there, f"the driver draws other calls on arm64: {here}, {there}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
