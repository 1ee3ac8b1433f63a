"""The GPU kernels: interpreted on the CPU, compiled for GPUs that need not be there, and run on one.

TRITON_INTERPRET counts when triton is imported, so that the checks run in processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from elsewhere import LOSSES, ROOT
from gpu_kernels import CALLS, TARGETS, Call, Step, compiled, everything, recorded

# Of what is asked of every loss: what does not run kernels, or runs them over too much to interpret.
NOT = "not formula and not threads and not more_dimensions and not autocast"
OVERLAPS = (
    "kernel_is or equals_what or layouts or the_same_bits or types_of or operators or ignored"
)
# One in so many, here and in `make nightly`.
EVERY = {
    "losses": (900, 300),
    "repeated": (100, 10),
    "overlaps": (160, 40),
    "checks": (5, 1),
    "options": (3, 1),
    "divided": (20, 1),
}

PARTS = {
    "options": ("tests/engines/gpu_checks.py", "test_option"),
    "checks": ("tests/engines/gpu_checks.py", "not test_option"),
    "errors": ("tests/engines/gpu_errors.py", ""),
    "alone": ("tests/engines/gpu_alone.py", ""),
    "linear": ("tests/engines/gpu_linear.py", ""),
    "overlaps": ("tests/losses/test_overlaps.py", OVERLAPS),
    "repeated": ("tests/route/test_repeat.py", "bits_of_a_call"),
    "divided": ("tests/losses/test_denominator.py", "test_mean_divides_by_it and number"),
    "losses": (" ".join(LOSSES), f"{NOT} and not depend_on_its_batch"),
}


def pytest_in(mode: str, files: str, keep: str, **environment: str) -> str:
    """The summary of a run of pytest in a process of its own, in which all must pass."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    variables |= {"FUSEDLOSS_TEST_GPU": mode, **environment}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *files.split(), "-k", keep],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    found = re.search(r"\d+ passed.*", done.stdout)
    assert found is not None, done.stdout[-2000:]
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["few", "more"]
)
@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part: str, more: bool, record_property: Callable[[str, object], None]) -> None:
    files, keep = PARTS[part]
    every = {"FUSEDLOSS_TEST_EVERY": str(EVERY.get(part, (1, 1))[more])}
    summary = pytest_in("interpreted", files, keep, TRITON_INTERPRET="1", **every)
    record_property(f"GPU kernels interpreted, {part}", summary)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("part", PARTS)
def test_on_a_gpu(part: str, record_property: Callable[[str, object], None]) -> None:
    files, keep = PARTS[part]
    record_property(f"GPU kernels on a GPU, {part}", pytest_in("cuda", files, keep))


# `make nightly` compiles all calls for all targets, with their backward.
COMPILED = [
    (call, target)
    for k, call in enumerate(c for c in CALLS if c.hot)
    for target in ("sm_90", ("sm_80", "sm_100", "gfx942")[k % 3])
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "target"), COMPILED, ids=[f"{call}-{target}" for call, target in COMPILED]
)
def test_compiles_without_a_spill(
    call: Call | Step, target: str, record_property: Callable[[str, object], None]
) -> None:
    with recorded() as found:
        call.forward()
    assert found
    for kernel in found:
        numbers = compiled(kernel, TARGETS[target])
        record_property(f"{target} {kernel}", str(numbers))
        assert numbers.spills == 0, f"{kernel} spills registers on {target}"


@pytest.mark.nightly
@pytest.mark.parametrize("target", TARGETS)
def test_everything_compiles(target: str, record_property: Callable[[str, object], None]) -> None:
    """Of a second or two each."""
    kernels = [(kernel, compiled(kernel, TARGETS[target])) for kernel in everything()]
    spilling = [f"{kernel}: {numbers}" for kernel, numbers in kernels if numbers.spills]
    record_property(f"kernels for {target}", f"{len(kernels)}, {len(spilling)} with spills")
    for line in spilling:
        record_property(f"{target} spills", line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_says_that_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    from fusedloss.cli import main

    assert main(["bench", "--device", "cuda", "--output", str(tmp_path / "out.json")]) == 2
    assert "torch finds no GPU" in capsys.readouterr().out
    assert main(["bench", "--device", "cuda", "--only", "nothing"]) == 2
