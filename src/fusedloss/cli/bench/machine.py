"""What the numbers of a run were taken on, and the head of its JSON file."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fusedloss

from ...engines.cpu import load
from ..processes import available

FORMAT = 1  # of the JSON files


class Run:
    """A run of a bench on the CPU: its machine, told at once, its clock and its file."""

    def __init__(self, threads: int, width: int) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = width
        self.started = time.perf_counter()
        self.machine = machine(threads)
        self.console.print(headline(self.machine), style="dim", markup=False)

    def document(self, **fields: Any) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "fusedloss": {"version": fusedloss.__version__, "commit": commit()},
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": self.machine,
            "seconds": round(time.perf_counter() - self.started),
            **fields,
        }

    def write(self, output: Path, document: dict[str, Any], also: str = "") -> None:
        output.write_text(json.dumps(document, allow_nan=False) + "\n")
        self.console.print(f"Wrote {output}{also} after {document['seconds']} s.")


def machine(threads: int) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": load.path().name if load.problem() is None else load.problem(),
        "memory_gb": round(available() / 1e9, 1) if available() < float("inf") else None,
        "huge_pages": huge_pages(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
    }


def gpu(device: str) -> dict[str, Any]:
    import triton

    about: dict[str, Any] = {
        "fusedloss": fusedloss.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "the interpreter",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "capability": torch.cuda.get_device_capability(0),
        }
    return about


def headline(machine: dict[str, Any]) -> str:
    return (
        f"fusedloss {fusedloss.__version__}, torch {torch.__version__}, {machine['cpu']}, "
        f"{machine['capability']}, threads: {machine['threads']}, load: {machine['load']}"
    )


def first_line(path: str, key: str = "") -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.startswith(key)), None)


def huge_pages() -> str | None:
    """always, madvise or never."""
    choices = first_line("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    found = re.search(r"\[(\w+)\]", choices)
    return found and found[1]


def cpu_model() -> str:
    line = first_line("/proc/cpuinfo", "model name")
    return line.partition(":")[2].strip() if line else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of these sources, where they lie in a repository that tracks them."""
    source = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(source.parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
