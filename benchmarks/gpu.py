"""Everything that a short loan of a GPU should be used for, in one call of at most nine minutes.

    python benchmarks/gpu.py --output gpu.json        # on the machine with the GPU
    python benchmarks/gpu.py --dry-run                # anywhere: every step, tiny and interpreted

The tests of the kernels first, then the times, then tiles that may be faster. The JSON is written anew
after each step, so that what an interruption leaves is whole.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520.0

# Rows at a time, classes at a time, whether that is all of them, warps.
TILES = {
    "CE 8192x128256 bf16": [
        *((1, block, False, warps) for block in (4096, 8192, 16384) for warps in (8, 16, 32)),
        (1, 32768, False, 32),
    ],
    "CE 32768x32768 bf16": [
        (1, 32768, True, 32),
        (1, 32768, True, 16),
        *((1, block, False, warps) for block in (4096, 8192, 16384) for warps in (8, 16)),
    ],
    "CE 16x21x512x512 bf16": [
        *((rows, block, False, 4) for rows in (256, 512, 1024) for block in (2, 4, 8)),
        (128, 32, True, 4),
        (256, 32, True, 8),
    ],
    "CE 65536x1024": [(rows, 1024, True, warps) for rows in (1, 2, 4) for warps in (2, 4, 8)],
}
BLOCKS = [(block, most) for block in (512, 1024, 2048, 4096) for most in (1056, 2048, 8192)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fusedloss-gpu.json"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"  # it counts when triton is imported
    sys.path.insert(0, str(ROOT / "tests"))
    if not (ROOT / "src/fusedloss/__init__.py").exists():
        raise SystemExit("benchmarks/gpu.py: run it from a checkout")
    sys.path.insert(0, str(ROOT / "src"))
    from fusedloss import gpu
    from fusedloss.cli import gpu as bench

    start = time.perf_counter()
    document: dict[str, Any] = {
        "format": 1,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

    def left() -> float:
        return args.seconds - (time.perf_counter() - start)

    def keep(part: str) -> Callable[[Any], None]:
        def kept(found: Any) -> None:
            document[part] = found
            document["seconds"] = round(time.perf_counter() - start)
            bench.write(args.output, document)

        return kept

    mode = "interpreted" if args.dry_run else "cuda"
    tests = ("gpu_checks.py", "test_option and mse" if args.dry_run else "")
    keep("checks")(tested(mode, *tests, min(150.0, left())))
    if args.dry_run:
        from fusedloss.gpu import interpreter

        interpreter.mend()
        gpu.on_cpu = True
    cases = tuple(c for c in bench.CASES if not args.dry_run or c.title.endswith(("bf16", "3x5")))
    limit = min(0.55 * args.seconds, left() - 60)
    bench.benchmark(keep("benchmark"), limit, args.dry_run, cases)
    keep("tiles")(tiles(bench, args.dry_run, left))
    keep("blocks")(blocks(bench, args.dry_run, left))
    if not args.dry_run and left() > 40:
        keep("losses")(tested(mode, "test_losses.py", "not formula and not threads", left() - 10))
    print(f"Wrote {args.output} after {document['seconds']} s.")
    return 0


def tested(mode: str, file: str, expression: str, seconds: float) -> dict[str, Any]:
    """The outcome of a file of tests, and what failed."""
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "FUSEDLOSS_TEST_GPU": mode, "PYTHONPATH": paths}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--maxfail=40",
        "--tb=short",
    ]
    command += [str(ROOT / "tests" / file), *(["-k", expression] if expression else [])]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(seconds, 1.0)
        )
    except subprocess.TimeoutExpired as expired:
        written = expired.stdout or b""
        text = written.decode(errors="replace") if isinstance(written, bytes) else written
        return {"file": file, "timed_out": True, "seen": text[-2000:]}
    print(file, *re.findall(r"\d+ (?:passed|failed).*", done.stdout)[-1:], flush=True)
    failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    tail = (done.stdout + done.stderr)[-6000:] if done.returncode else done.stdout[-300:]
    return {"file": file, "returncode": done.returncode, "failed": failed, "tail": tail}


def trial(bench: Any, case: Any, device: str, rounds: int) -> float | str:
    try:
        work = bench.Work(case, device)
        step = work.differentiate(case.row.function)
        step()
        return bench.statistics.median(bench.interleaved({"ours": step}, device, rounds)["ours"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def tiles(bench: Any, dry: bool, left: Callable[[], float]) -> list[dict[str, Any]]:
    """Times of cross entropy by other tiles than the rule's."""
    from fusedloss.gpu import rows

    found, rule = [], rows.tile
    for case in bench.CASES:
        for candidate in TILES.get(case.title, []):
            if left() < 60:
                break
            if dry:
                candidate = (2, 16, True, 4)
            rows.tile = lambda *_, candidate=candidate: rows.Tile(*candidate)
            seconds = trial(bench, bench.small(case) if dry else case, "cpu" if dry else "cuda", 5)
            found.append({"title": case.title, "tile": candidate, "seconds": seconds})
            if dry:
                break
    rows.tile = rule
    return found


def blocks(bench: Any, dry: bool, left: Callable[[], float]) -> list[dict[str, Any]]:
    """Times of pointwise losses by other blocks and numbers of programs."""
    from fusedloss.gpu import pointwise

    found, rule = [], (pointwise.BLOCK, pointwise.MOST_PROGRAMS)
    for case in bench.CASES:
        if case.title not in ("MSE 64M", "MSE 64M bf16", "BCE with logits 64M bf16"):
            continue
        for candidate in BLOCKS[:1] if dry else BLOCKS:
            if left() < 50:
                break
            pointwise.BLOCK, pointwise.MOST_PROGRAMS = candidate
            seconds = trial(bench, bench.small(case) if dry else case, "cpu" if dry else "cuda", 5)
            found.append({"title": case.title, "block": candidate, "seconds": seconds})
    pointwise.BLOCK, pointwise.MOST_PROGRAMS = rule
    return found


if __name__ == "__main__":
    sys.exit(main())
