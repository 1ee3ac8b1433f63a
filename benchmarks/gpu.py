"""Everything that a short loan of a GPU should be used for, in one call of at most nine minutes.

    python benchmarks/gpu.py --output gpu.json        # on the machine with the GPU
    python benchmarks/gpu.py --dry-run                # anywhere: every step, tiny and interpreted

The tests of the kernels first, then the times, then tiles that may be faster. The JSON is written anew
after each step, so that what an interruption leaves is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520.0
LINEAR = 35.0
PLUGINS = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "ignore::DeprecationWarning"]
WARMING = 4  # processes
# Of test_repeat.py what is not about the host.
HOSTS = "gpu_checks or gpu_errors or gpu_alone or gpu_linear or bits_of_a_call"
# As in tests/engines/test_gpu.py and tests/elsewhere.py.
SUBJECTS = ("against_torch", "kernels", "means", "derivatives", "specials", "bits")
LOSSES = [f"losses/test_{subject}.py" for subject in SUBJECTS]
NOT = "not formula and not threads and not more_dimensions and not autocast"

# Rows at a time, classes at a time, whether that is all of them, warps.
LOOPED = [
    (1, block, False, warps)
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 32))
]
TILES: dict[str, list[tuple[int, int, bool, int]]] = {
    "CE 8192x128256 bf16": [*LOOPED[2:], (1, 32768, False, 32)],
    "CE 32768x32768 bf16": [(1, 32768, True, 32), *LOOPED],
    "CE 8192x32000": [(1, 32768, True, 32), *LOOPED[:5]],
    "CE 8192x32000 bf16": [(1, 32768, True, 32), *LOOPED[:5]],
    "CE smoothing 8192x32000 bf16": LOOPED[1:],
    "CE probabilities 8192x32000 bf16": LOOPED[1:],
    "CE 16x21x512x512": [
        *((rows, block, False, 4) for rows, block in ((1024, 4), (512, 4), (512, 8), (1024, 2))),
        *((64 * k, 32, True, 2 * k) for k in (1, 2, 4)),
    ],
    "CE 16x21x512x512 bf16": [
        *((rows, block, False, 4) for rows, block in ((1024, 4), (512, 4), (512, 8))),
        *((64 * k, 32, True, 2 * k) for k in (1, 2, 4)),
    ],
    "CE 65536x1024": [
        (rows, 1024, True, warps) for rows, warps in ((2, 4), (1, 1), (1, 2), (1, 4), (4, 8))
    ],
    "CE 1048576x21": [
        (rows, 32, True, warps) for rows, warps in ((64, 4), (32, 1), (128, 4), (256, 4), (256, 8))
    ],
}
BLOCKS = [(1024, 2048), (1024, 65536), (2048, 2112), (2048, 65536), (4096, 1056), (4096, 2112)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fusedloss-gpu.json"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="default: %(default)s")
    parser.add_argument("--tests", type=float, default=150.0, help="seconds: %(default)s")
    parser.add_argument("--every", type=int, default=4, help="one in so many tests of losses")
    parser.add_argument("--bench", type=float, default=200.0, help="seconds: %(default)s")
    parser.add_argument("--parts", nargs="+", help="of checks, benchmark, linear, tiles, blocks")
    parser.add_argument("--budgets", nargs="*", type=int, default=[], help="MiB, of linear losses")
    parser.add_argument("--best", action="store_true", help="go on with the fastest tiles")
    parser.add_argument("--warm", nargs=2, type=int, metavar=("PART", "OF"), help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"  # it counts when triton is imported
    sys.path.insert(0, str(ROOT / "tests"))
    if not (ROOT / "src/fusedloss/__init__.py").exists():
        raise SystemExit("benchmarks/gpu.py: run it from a checkout")
    sys.path.insert(0, str(ROOT / "src"))
    from fusedloss import engines
    from fusedloss.cli.bench import cuda as bench
    from fusedloss.cli.bench import heads as linear

    if args.warm:
        warm(bench, *args.warm)
        return 0
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
    wanted = args.parts

    def due(part: str) -> bool:
        return (wanted is None or part in wanted) and left() > 0

    def spare() -> float:
        """What the times of the rule's own tiles leave."""
        return left() - args.bench * due("benchmark") - LINEAR * due("linear")

    smoke = tested(mode, ["engines/gpu_checks.py"], "test_option and mse", min(90.0, left()), 0)
    keep("smoke")(smoke)
    if smoke.get("returncode") != 0:
        print(smoke.get("tail") or smoke.get("seen"))
        return 1
    warming = []
    if not args.dry_run and any(map(due, ("benchmark", "tiles", "blocks"))):
        command = [sys.executable, "-W", "ignore", __file__, "--warm"]
        warming = [subprocess.Popen([*command, str(k), str(WARMING)]) for k in range(WARMING)]
    if due("checks") and not args.dry_run:
        names = ("checks", "errors", "alone", "linear")
        files = [*(f"engines/gpu_{name}.py" for name in names), "route/test_repeat.py"]
        with ThreadPoolExecutor() as pool:
            limit = min(args.tests, left())
            runs = {
                "checks": pool.submit(
                    tested, mode, files, HOSTS, limit, 6, max(args.every // 4, 1)
                ),
                "losses": pool.submit(tested, mode, LOSSES, NOT, limit, 6, args.every),
            }
            for part, outcome in runs.items():
                keep(part)(outcome.result())
    stack = contextlib.ExitStack()
    if args.dry_run:
        stack.enter_context(engines.interpreted())
    cases = tuple(c for c in bench.CASES if not args.dry_run or c.title.endswith(("bf16", "3x5")))
    for process in warming:
        process.wait()
    if due("tiles"):
        found = tiles(bench, args.dry_run, spare)
        keep("tiles")(found)
        if args.best:
            keep("chosen")(choose(bench, found))
    if due("blocks"):
        keep("blocks")(blocks(bench, args.dry_run, spare))
    if due("benchmark"):
        bench.benchmark(keep("benchmark"), min(args.bench, left()), args.dry_run, cases)
    if due("linear"):
        budgets = () if args.dry_run else tuple(2**20 * m for m in args.budgets)
        linear.benchmark(keep("linear"), lambda: left() - 15, args.dry_run, budgets)
    print(f"Wrote {args.output} after {document['seconds']} s.")
    return 0


def tested(
    mode: str, files: list[str], expression: str, seconds: float, processes: int, every: int = 1
) -> dict[str, Any]:
    """The outcome of files of tests, and what failed."""
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "FUSEDLOSS_TEST_GPU": mode, "PYTHONPATH": paths}
    environment["FUSEDLOSS_TEST_EVERY"] = str(every)
    command = [sys.executable, "-m", "pytest", *PLUGINS, "-n", str(processes), "--maxfail=30"]
    command += ["--tb=short", "--show-capture=no", "-k", expression]
    command += [str(ROOT / "tests" / file) for file in files]
    start = time.perf_counter()
    done = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    late = threading.Timer(max(seconds, 1.0), done.send_signal, [signal.SIGINT])
    late.start()
    text, _ = done.communicate()
    late.cancel()
    print(*files, *re.findall(r"\d+ (?:passed|failed).*", text)[-1:], flush=True)
    failed = re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)
    print(*failed[:12], sep="\n", flush=True)
    return {
        "files": files,
        "returncode": done.returncode,
        "seconds": round(time.perf_counter() - start),
        "failed": failed,
        "tail": text[-60000:] if done.returncode else text[-300:],
    }


def warm(bench: Any, part: int, parts: int) -> None:
    """Compiles what `benchmark`, `tiles` and `blocks` will run, without running it."""
    from fusedloss.engines.gpu import launch

    def compiles(_: Any, case: Any, device: str, rounds: int) -> float:
        with contextlib.suppress(Exception):
            bench.GpuWork(case, device).differentiate(case.row.function)()
        return 0.0

    launch.run = launch.ready
    bench.CASES = bench.CASES[part::parts]
    for case in bench.CASES:
        compiles(bench, case, "cuda", 1)
    tiles(bench, False, lambda: 1e9, compiles)
    blocks(bench, False, lambda: 1e9, compiles)


def trial(bench: Any, case: Any, device: str, rounds: int) -> float | str:
    try:
        work = bench.GpuWork(case, device)
        step = (work.graphed if device == "cuda" else work.differentiate)(case.row.function)
        step()
        return statistics.median(bench.interleaved({"ours": step}, device, rounds)["ours"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def tiles(
    bench: Any,
    dry: bool,
    left: Callable[[], float],
    attempt: Callable[..., float | str] = trial,
) -> list[dict[str, Any]]:
    """Times of cross entropy by other tiles than the rule's."""
    from fusedloss.engines.gpu import cross_entropy
    from fusedloss.route import memo

    found, rule = [], cross_entropy.tile
    for case in bench.CASES:
        for candidate in TILES.get(case.title, []):
            if left() < 0:
                break
            if dry:
                candidate = (2, 16, True, 4)
            cross_entropy.tile = lambda *_, candidate=candidate: cross_entropy.Tile(*candidate)
            memo.known.clear()
            seconds = attempt(
                bench, bench.small(case) if dry else case, "cpu" if dry else "cuda", 5
            )
            found.append({"title": case.title, "tile": candidate, "seconds": seconds})
            if dry:
                break
    cross_entropy.tile = rule
    memo.known.clear()
    return found


def choose(bench: Any, found: list[dict[str, Any]]) -> dict[str, Any]:
    """From now on the fastest tile of each case."""
    from fusedloss.engines.gpu import cross_entropy
    from fusedloss.route import memo

    best: dict[tuple[Any, ...], tuple[float, str, Any]] = {}
    asked: list[tuple[Any, ...]] = []
    rule = cross_entropy.tile

    def ask(*key: Any) -> Any:
        asked.append(key)
        return rule(*key)

    cross_entropy.tile = ask
    for case in bench.CASES:
        own = [t for t in found if t["title"] == case.title and isinstance(t["seconds"], float)]
        if own:
            memo.known.clear()
            asked.clear()
            bench.GpuWork(case, "cuda").outcome(case.row.function)
            fastest = min(own, key=lambda t: t["seconds"])
            best[asked[0]] = fastest["seconds"], case.title, cross_entropy.Tile(*fastest["tile"])
    cross_entropy.tile = lambda *key: best[key][2] if key in best else rule(*key)
    memo.known.clear()
    return {title: tile for _, title, tile in best.values()}


def blocks(
    bench: Any,
    dry: bool,
    left: Callable[[], float],
    attempt: Callable[..., float | str] = trial,
) -> list[dict[str, Any]]:
    """Times of pointwise losses by other blocks and numbers of programs."""
    from fusedloss.engines.gpu import pointwise
    from fusedloss.route import memo

    found, rule = [], (pointwise.BLOCK, pointwise.MOST_PROGRAMS)
    for case in bench.CASES:
        if case.title not in ("MSE 64M bf16", "BCE with logits 64M bf16"):
            continue
        for candidate in BLOCKS[:1] if dry else BLOCKS:
            if left() < 0:
                break
            pointwise.BLOCK, pointwise.MOST_PROGRAMS = candidate
            memo.known.clear()
            seconds = attempt(
                bench, bench.small(case) if dry else case, "cpu" if dry else "cuda", 5
            )
            found.append({"title": case.title, "block": candidate, "seconds": seconds})
    pointwise.BLOCK, pointwise.MOST_PROGRAMS = rule
    memo.known.clear()
    return found


if __name__ == "__main__":
    sys.exit(main())
