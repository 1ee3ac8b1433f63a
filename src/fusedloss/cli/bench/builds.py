"""Another build of fusedloss beside this one: the same calls on the same tensors, each in a worker of its own.

The workers run this file as a script, which knows nothing of the package, so that both are treated alike. They
sample in turn: while one runs the other waits for its next line.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path[0] = sys.argv[1]  # in place of this folder
    from importlib.util import find_spec

    if not ((spec := find_spec("fusedloss")) and str(spec.origin).startswith(sys.argv[1])):
        # An editable install's finder comes before the path.
        sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]

import functools
import hashlib
import itertools
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .harness import Plan, Sampler, Work

OURS = str(Path(__file__).resolve().parents[3])


class Build:
    """A worker with the fusedloss of a folder."""

    def __init__(self, folder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, *words: object) -> str:
        assert self.process.stdin and self.process.stdout
        print(*words, file=self.process.stdin)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a build's worker ended with exit code {self.process.wait()}")
        return line.strip()

    def sample(self, calls: int) -> float:
        return float(self.ask("sample", calls))

    def outcome(self) -> str:
        """A digest of the loss and its gradients."""
        return self.ask("outcome")


@functools.cache
def started(name: str, folder: str) -> Build:
    """It ends with this process, whose pipe it reads."""
    return Build(folder)


def both_builds(work: Work, plan: Plan) -> tuple[dict[str, Sampler], bool]:
    """The samplers "new" and "old", warm on the tensors of the case, and whether their bits are the same."""
    builds = {name: started(name, f) for name, f in (("new", OURS), ("old", plan.against))}
    name = work.case.loss.partition("[")[0]
    recipe = name, work.bare, work.learned, work.settings, plan.threads
    with tempfile.NamedTemporaryFile() as file:
        torch.save(recipe, file)
        file.flush()
        for build in builds.values():
            build.ask("load", file.name)
    same = builds["new"].outcome() == builds["old"].outcome()
    return {name: build.sample for name, build in builds.items()}, same


def package_folder(path: Path) -> str | None:
    """The folder from which a checkout, or a folder of installed packages, imports fusedloss."""
    for folder in (path / "src", path):
        if (folder / "fusedloss/__init__.py").exists():
            return str(folder.resolve())
    return None


class Worker:
    """What answers in the other process."""

    def __init__(self, folder: str) -> None:
        from fusedloss import functional

        assert str(functional.__file__).startswith(folder), functional.__file__
        self.functional = functional

    def load(self, recipe: str) -> str:
        loaded = torch.load(recipe, weights_only=False)
        name, self.tensors, learned, self.settings, threads = loaded
        torch.set_num_threads(threads)
        # A thread's own time is not stretched by other programs.
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.function = getattr(self.functional, name)
        self.leaves = [self.tensors[k].requires_grad_() for k in learned]
        self.sample("3")
        return "ready"

    def outcome(self) -> str:
        loss = self.function(*self.tensors, **self.settings)
        found = [loss.detach(), *torch.autograd.grad(loss, self.leaves)]
        bits = (t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in found)
        return hashlib.sha256(b"".join(bits)).hexdigest()

    def sample(self, calls: str) -> float:
        function, tensors, settings = self.function, self.tensors, self.settings
        leaves = self.leaves

        def step() -> None:
            function(*tensors, **settings).backward()
            for leaf in leaves:
                leaf.grad = None

        repeat = itertools.repeat(None, int(calls))
        time.sleep(0.003)  # until the other worker's threads rest
        step()
        start = self.clock()
        for _ in repeat:
            step()
        return (self.clock() - start) / int(calls)


def main(folder: str) -> None:
    worker = Worker(folder)
    for line in sys.stdin:
        what, *words = line.split()
        print(getattr(worker, what)(*words), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
