"""DTensors: what two processes compute is what one computes of the whole tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_dtensors() -> None:
    """In one start of processes: of each the names of its checks, and what went wrong."""
    script = Path(__file__).parent / "sharded_checks.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for names, errors in json.loads(done.stdout):
        assert len(names) > 50
        assert not errors, "\n".join(f"{name}: {error}" for name, error in errors.items())
