"""The C++ core under the address, undefined-behaviour and thread sanitizers, and under valgrind.

`make sanitize` runs it. native/driver.cpp makes random calls of the C ABI under all of them; the
kernels' own tests run on a library built with the first two.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import elsewhere

DEBUG = ("-O1", "-g", "-D_GLIBCXX_ASSERTIONS")
MEMORY = (*DEBUG, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = (*DEBUG, "-fsanitize=thread")
# valgrind knows no AVX-512.
PLAIN = (*DEBUG, "-march=x86-64-v2") if platform.machine() in ("x86_64", "AMD64") else DEBUG
DRIVER = "tests/native/driver.cpp"
TESTS = ("tests/test_losses.py", "-k", "each_layout or specials_go or more_dimensions")


def driver(root: Path, *extra: str) -> Path:
    to = Path(tempfile.mkdtemp(dir=root)) / "driver"
    elsewhere.link(root, DRIVER, to, "-pthread", *extra)
    return to


def run(*command: object) -> None:
    print(*command, flush=True)
    subprocess.run(list(map(str, command)), check=True)


def runtime(name: str) -> str:
    """The path of a sanitizer's runtime library."""
    command = [elsewhere.CXX, f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def kernel_tests(root: Path) -> None:
    """On a library built with the memory sanitizers."""
    environment = {
        # torch's own leaks are not ours to find, and nothing else in the process is instrumented.
        "LD_PRELOAD": runtime("asan"),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = elsewhere.pytest_there(root, TESTS, environment)
    print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
    done.check_returncode()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = elsewhere.copy(Path(folder) / "copy")
        elsewhere.print_formulas(root)
        with ThreadPoolExecutor(2) as pool:
            memory, threads, plain = (
                pool.submit(driver, root, *kind)
                for kind in (MEMORY, THREADS, (*DEBUG, "-march=x86-64-v2"))
            )
            library = pool.submit(elsewhere.build, root, *MEMORY)
            runs = [
                pool.submit(run, memory.result(), 1, 400, 1),
                pool.submit(run, threads.result(), 2, 300, 4),
            ]
            if shutil.which("valgrind"):
                command = ("valgrind", "-q", "--error-exitcode=9", plain.result(), 3, 60, 1)
                runs.append(pool.submit(run, *command))
            else:
                print("valgrind is not installed: skipped")
            library.result()
            runs.append(pool.submit(kernel_tests, root))
            for done in runs:
                done.result()
    print("sanitize: no fault")


if __name__ == "__main__":
    sys.exit(main())
