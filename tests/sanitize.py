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
MEMORY = (*DEBUG, "-fno-sanitize-recover=all", "-fsanitize=address,undefined")
THREADS = (*DEBUG, "-fsanitize=thread")
# valgrind knows no AVX-512.
PLAIN = (*DEBUG, "-march=x86-64-v2") if platform.machine() in ("x86_64", "AMD64") else DEBUG
DRIVER = "tests/native/driver.cpp"
FILES = (
    *elsewhere.LOSSES,
    "tests/heads/test_formula.py",
    "tests/heads/test_log_prob.py",
    "tests/heads/test_divergence.py",
    "tests/losses/test_hostile.py",
)
WORDS = (
    *("each_layout", "specials_go", "more_dimensions"),
    *("loop_is_the_formula", "log_prob", "divergence", "any_call"),
)


def works(root: Path, *flags: str) -> bool:
    """Whether a program with these sanitizers can be linked here, and starts."""
    source, program = root / "empty.cpp", Path(tempfile.mkdtemp(dir=root)) / "empty"
    source.write_text("int main() {}\n")
    command = [elsewhere.CXX, *flags, "-o", program, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"skipped: {elsewhere.CXX} {flags[-1]} does not work here\n{done.stderr}", flush=True)
    return done.returncode == 0


def driver(root: Path, *extra: str) -> Path:
    to = Path(tempfile.mkdtemp(dir=root)) / "driver"
    elsewhere.link(root, [DRIVER, *elsewhere.UNITS], to, *elsewhere.flags(), "-pthread", *extra)
    return to


def run(*command: object) -> None:
    print(*command, flush=True)
    subprocess.run(list(map(str, command)), check=True)


def runtime(name: str) -> Path:
    """A sanitizer's runtime library; a bare name where the compiler has none that can be shared."""
    command = [elsewhere.CXX, f"-print-file-name=lib{name}.so"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def memory(root: Path) -> None:
    run(driver(root, *MEMORY), 1, 600, 1)


def threads(root: Path) -> None:
    run(driver(root, *THREADS), 2, 450, 4)


def valgrind(root: Path) -> None:
    run("valgrind", "-q", "--error-exitcode=9", driver(root, *PLAIN), 3, 90, 1)


def kernel_tests(root: Path) -> None:
    """On a library built with the memory sanitizers, in a copy of its own: it prints what others compile."""
    root = elsewhere.copy(root.with_name("tested"))
    elsewhere.build(root, *MEMORY)
    environment = {
        # torch's own leaks are not ours to find, and nothing else in the process is instrumented.
        # Where PyTorch throws, asan looks for the C++ library, which Python has not loaded first.
        "LD_PRELOAD": f"{runtime('asan')} {runtime('stdc++')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = elsewhere.pytest_there(root, (*FILES, "-k", " or ".join(WORDS)), environment)
    print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
    done.check_returncode()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = elsewhere.copy(Path(folder) / "copy")
        elsewhere.print_formulas(root)
        passes = []
        if works(root, *MEMORY):
            passes.append(memory)
            if runtime("asan").is_absolute():
                passes.insert(0, kernel_tests)  # the longest
            else:
                print(
                    f"skipped: {elsewhere.CXX} has no libasan.so for the kernels' tests", flush=True
                )
        if works(root, *THREADS):
            passes.append(threads)
        if shutil.which("valgrind"):
            passes.append(valgrind)
        else:
            print("skipped: valgrind is not installed", flush=True)
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(each, root) for each in passes]:
                done.result()
    print("sanitize: no fault;", ", ".join(p.__name__ for p in passes) or "no pass", "done")


if __name__ == "__main__":
    sys.exit(main())
