"""Every CPU capability that this machine has, each in a process of its own.

PyTorch reads ATEN_CPU_CAPABILITY once, so the tests proper run under the machine's best alone. As a
script this file runs a part of the registry and prints what ran.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    CASES,
    FLOATS,
    Case,
    assert_same_bits,
    check,
    each_dtype,
    parameters_reduced,
    run,
)
from torch import Generator

import fusedloss
from fusedloss.engines.cpu import load

# What the flags of /proc/cpuinfo must hold; the first kernels need nothing that a machine may lack.
CAPABILITIES = {
    "default": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_capability(capability: str, record_property: Callable[[str, object], None]) -> None:
    if lacking := CAPABILITIES[capability] - flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(lacking))}")
    done = subprocess.run(
        [sys.executable, __file__],
        env={
            **os.environ,
            "ATEN_CPU_CAPABILITY": capability,
            "PYTHONPATH": str(Path(__file__).parent.parent),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["capability"] == capability
    assert Path(report["library"]).name == f"libfusedloss_{capability}.so"
    assert report["kernels"] == report["calls"] > 0
    record_property(
        f"ATEN_CPU_CAPABILITY={capability}",
        f"{report['calls']} calls right, by {Path(report['library']).name}",
    )


@pytest.mark.one_in(3)
@parameters_reduced()
@each_dtype
def test_small_inputs_get_the_bits_of_large_ones(
    case: Case,
    reduction: str,
    dtype: torch.dtype,
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if load.path(small=True) == load.path():
        pytest.skip("small inputs have the same kernels")
    for shape in [(3, 5), (13, 80), (2, 1000)] + ([(2, 5, 70)] if case.kind == "rows" else []):
        tensors, options = case.example(shape, dtype, generator)
        options["reduction"] = reduction

        small = run(case.function, tensors, options, case.loss.differentiable)
        with monkeypatch.context() as patch:
            patch.setattr(load, "SMALL", 0)
            large = run(case.function, tensors, options, case.loss.differentiable)
        assert_same_bits(small, large)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    generator = Generator().manual_seed(0)
    kernels = calls = 0
    for case in CASES:
        shapes = [(4, 37), (2, 1030)] + ([(2, 5, 70)] if case.kind == "rows" else [])
        for shape in shapes:
            for dtype in FLOATS:
                tensors, options = case.example(shape, dtype, generator)
                for options["reduction"] in ("none", "mean"):
                    check(case, tensors, options, generator)
                    calls += 1
                    route = fusedloss.explain(case.function, *tensors, **options)
                    kernels += route.kernel is not None
    report = {
        "capability": load.capability(),
        "library": load.library()._name,
        "kernels": kernels,
        "calls": calls,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
