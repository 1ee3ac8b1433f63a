"""Lazy heads under DDP and FSDP2, against one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_weights_are_those_of_one_process() -> None:
    script = Path(__file__).parent / "distributed_checks.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
