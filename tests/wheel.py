"""The wheel and the sdist: what is in them, and that they install and run where there is no compiler.

`make wheel` builds them into dist/; `python tests/wheel.py` then looks at what is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import bare

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
MOST_BYTES = 5_000_000
OLDEST = (2, 28)  # glibc, as torch's own wheels have it
LEFT_OUT = (".ci/", ".github/", "benchmarks/", "findings/")  # of the sdist

CONTRACT = """
import torch
from torch import Tensor
from fusedloss import nn

class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer: torch.nn.Linear = nn.Linear(4, 3)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss.forward(self.layer(x), target)
"""


def only(pattern: str) -> Path:
    found = sorted(DIST.glob(pattern))
    assert len(found) == 1, f"dist/ must have one {pattern}, and has {len(found)}: run make wheel"
    return found[0]


def contents(wheel: Path, sdist: Path) -> None:
    """Tags, sizes and files."""
    tag = re.fullmatch(r".*-py3-none-manylinux_[\w.]+\.whl", wheel.name)
    oldest = [(int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", wheel.name)]
    assert tag and min(oldest) <= OLDEST, f"{wheel.name}: not for glibc {OLDEST}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        page = archive.read(about).decode()
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*.py*")}
    sources = {n for n in sources if "__pycache__" not in n}
    missing = sources - set(names)
    assert not missing, f"{wheel.name} lacks {sorted(missing)}"
    dead = re.findall(r"\]\((?!https?:|#)[^)]*\)", page)
    assert "fused" in page and not dead, f"{wheel.name}: its page has the links {dead}"
    foreign = [n for n in names if not n.startswith(("fusedloss/", "fusedloss-"))]
    assert not foreign, f"{wheel.name} has {foreign}"
    assert sum(n.endswith(".so") for n in names) >= 1
    with tarfile.open(sdist) as archive:
        held = {n.partition("/")[2] for n in archive.getnames()}
    command = ["git", "ls-files", "--cached"]
    tracked = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    wanted = {n for n in tracked.split() if not n.startswith(LEFT_OUT) and (ROOT / n).exists()}
    assert wanted <= held, f"{sdist.name} lacks {sorted(wanted - held)}"
    for path in (wheel, sdist):
        size = path.stat().st_size
        print(f"{path.name}: {size / 1e6:.2f} MB")
        assert size < MOST_BYTES


def installed(wheel: Path, root: Path) -> Path:
    """An environment with torch and the wheel, and the interpreter in it."""
    venv.create(root, with_pip=False, symlinks=True)
    python = root / "bin/python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    bare.fill(site, "torch")
    pip = ["pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run(
        [sys.executable, "-m", *pip, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    return python


def runs(python: Path) -> None:
    """Where nothing but the environment's own programs is on PATH, and no source is near."""
    root = python.parent.parent
    shutil.copy(Path(__file__).with_name("installed.py"), root)
    alone = {"PATH": str(python.parent), "HOME": str(root)}

    def run(*command: object) -> str:
        done = subprocess.run(
            [str(c) for c in command], cwd=root, env=alone, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    site = next(root.glob("lib/python*/site-packages"))
    print(run(python, root / "installed.py", site).strip())
    command = python.with_name("fusedloss")
    print(run(command, "--version").strip())
    assert "CPU kernels     /" in run(command, "info")
    for name in ("demo", "bench", "verify", "info"):
        run(command, name, "--help")


def typed(python: Path) -> None:
    """A type checker finds torch's types and ours in what is installed."""
    root = python.parent.parent
    (root / "user.py").write_text(CONTRACT)
    words = ("-m", "mypy", "--strict", "--python-executable", python, "user.py")
    cache = {**os.environ, "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache/wheel")}
    subprocess.run([sys.executable, *words], cwd=root, env=cache, check=True)


def main() -> None:
    wheel, sdist = only("*.whl"), only("*.tar.gz")
    contents(wheel, sdist)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    with tempfile.TemporaryDirectory() as folder:
        python = installed(wheel, Path(folder) / "bare")
        runs(python)
        typed(python)


if __name__ == "__main__":
    sys.exit(main())
