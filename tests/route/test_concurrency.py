"""Many threads at once, forked workers, an interpreter that exits, and memory that runs out."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import CASES as EVERY
from conftest import Outcome, assert_same_bits, no_head, run
from elsewhere import run_python
from torch import Generator
from torch.utils.data import DataLoader, Dataset

import fusedloss

CASES = [case for case in EVERY if no_head(case)]  # products of more threads may be other ones
SIZE = 70_000  # elements: enough for several threads
CALLERS = 8


def call(number: int) -> Outcome:
    """A forward and backward that depends on the number alone."""
    case = CASES[number % len(CASES)]
    generator = Generator().manual_seed(number)
    tensors, options = case.example((7, SIZE // 7), torch.float32, generator)
    return run(case.loss.function, tensors, options, case.loss.differentiable)


@pytest.mark.slow
def test_eight_threads_at_once() -> None:
    numbers = range(2 * len(CASES))
    expected = [call(n) for n in numbers]
    barrier = threading.Barrier(CALLERS)

    def work(start: int) -> list[tuple[int, Outcome]]:
        barrier.wait()
        return [(n, call(n)) for n in numbers[start::4]]  # two callers for each number

    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(CALLERS) as pool:
            for results in pool.map(work, (k % 4 for k in range(CALLERS))):
                for n, result in results:
                    assert_same_bits(result, expected[n])
    finally:
        torch.set_num_threads(1)


def test_number_of_threads_changed_between_calls() -> None:
    expected = [call(n) for n in range(len(CASES))]
    try:
        for threads in (2, 3, 1, 8, 2):
            torch.set_num_threads(threads)
            for n in range(threads, len(CASES), 5):
                assert_same_bits(call(n), expected[n])
    finally:
        torch.set_num_threads(1)


class Losses(Dataset[Outcome]):
    def __len__(self) -> int:
        return len(CASES)

    def __getitem__(self, number: int) -> Outcome:
        return call(number)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_forked_workers() -> None:
    """After the parent has used the kernels on two threads."""
    torch.set_num_threads(2)
    try:
        expected = [call(n) for n in range(len(CASES))]
        loader = DataLoader(
            Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
        )
        for n, result in enumerate(loader):
            assert_same_bits(result, expected[n])
    finally:
        torch.set_num_threads(1)


AT_EXIT = """
import atexit, threading, time, torch, fusedloss
torch.set_num_threads(2)
x, y = torch.randn(300, 300, requires_grad=True), torch.zeros(300, dtype=torch.long)
def loss():
    fusedloss.cross_entropy(x, y).backward()
    fusedloss.mse_loss(x, x.detach()).backward()
class Late:
    def __del__(self):
        try:
            loss()
        except (ImportError, TypeError, AttributeError, NameError):
            pass  # the modules are gone already
late = Late()
atexit.register(lambda: (loss(), print("done")))
rows = 20_000
wide, labels = torch.zeros(1, 2**16).expand(rows, -1), torch.zeros(rows, dtype=torch.long)
begun = threading.Event()
def long_call():
    begun.set()
    fusedloss.cross_entropy(wide, labels)
    print("the call should have outlived the interpreter")
loss()
threading.Thread(target=long_call, daemon=True).start()
begun.wait()
time.sleep(0.02)
"""


@pytest.mark.slow
def test_interpreter_exit() -> None:
    """At exit, in finalizers, and in a daemon thread that is cut off within a kernel.

    Cut off in an operator of PyTorch (`torch.empty_like` in a loop will do), any thread aborts.
    """
    done = run_python(AT_EXIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


NO_MEMORY = """
import resource, torch, fusedloss
one = torch.zeros(1, 1)
fusedloss.cross_entropy(one, torch.tensor([0]))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
for threads in (1, 2):
    torch.set_num_threads(threads)
    for call in (
        lambda: fusedloss.cross_entropy(one.expand(16, 2**28), torch.tensor([0] * 16)),
        lambda: fusedloss.cross_entropy(one.expand(64, 2**28), torch.tensor([0] * 64)),
        lambda: fusedloss.triplet_margin_loss(*[one.expand(1, 2**29)] * 3),
    ):
        try:
            print("value", call())
        except RuntimeError as error:
            print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_memory_for_scratch() -> None:
    """An error of PyTorch's type, where an exception of C++ would end the process."""
    done = run_python(NO_MEMORY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert "can't allocate memory" in line, line


FLUSHED = """
import torch, fusedloss
def outcomes():
    g = torch.Generator().manual_seed(3)
    x = (1e-39 * torch.randn(40_000, generator=g)).requires_grad_()
    half = (torch.rand(40_000, generator=g) * -1e-4).half().requires_grad_()
    found = [fusedloss.mse_loss(x * 1, 0 * x.detach() + 1e-39, reduction="none")]
    found += [fusedloss.kl_div(x.expand(2, -1), x.detach().expand(2, -1), log_target=True, reduction="none")]
    rows = x.view(-1, 10)
    labels = torch.zeros(len(rows), dtype=torch.long)
    found += [fusedloss.nll_loss(rows, labels, reduction="none")]
    peaks = torch.cat([rows[:, :1] * 0 + 95, rows[:, 1:]], 1)
    found += [fusedloss.cross_entropy(peaks, labels, reduction="none")]
    found += [fusedloss.kl_div(half, torch.ones_like(half), reduction="none")]
    grads = torch.autograd.grad([t.sum() for t in found], [x, half])
    return [*(t.detach() for t in found), *grads]
torch.set_num_threads(2)
outcomes()  # the pool has its threads now
for flush in (False, True):
    assert torch.set_flush_denormal(flush)
    torch.set_num_threads(2)
    two = outcomes()
    torch.set_num_threads(1)
    one = outcomes()
    print(flush, [torch.equal(a, b) for a, b in zip(one, two)], (one[3] != 0).all().item())
    x = torch.full((33,), -1.98e-4 / 4).half()
    for t in (x, torch.stack([x, x], 1)[:, 0]):
        print(fusedloss.kl_div(t, torch.ones(33).half(), reduction="sum").item())
    grad = torch.full((), 3e-7).half()
    y = torch.zeros(33, dtype=torch.half, requires_grad=True)
    z = torch.autograd.grad(fusedloss.mse_loss(y, y.detach() + 1, reduction="none"), y, grad.expand(33))
    print(z[0].unique().tolist())
"""


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="flushes no subnormals here")
def test_every_thread_flushes_what_the_caller_does() -> None:
    """And float16 is read and written as it is, subnormal or not."""
    done = run_python(FLUSHED)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"False {[True] * 7} True"
    assert lines[4] == f"True {[True] * 7} False"
    assert lines[1:4] == lines[5:8] and float(lines[1]) > 1e-3, lines


SMALL_STACK = """
import threading, torch, fusedloss
from fusedloss.engines.cpu import load, linear, pointwise, reduction, rows
torch.set_num_threads(1)
losses = []
for dtype in (torch.float32, torch.float64):
    x, y = torch.randn(3, 2000, dtype=dtype), torch.rand(3, 2000, dtype=dtype)
    labels, weight = torch.tensor([0, 1, 2]), torch.rand(2000, dtype=dtype)
    few = x[:, :7].contiguous()
    losses += [
        lambda x=x, y=y: fusedloss.binary_cross_entropy(y, y.t().contiguous().t()),
        lambda x=x, y=y: fusedloss.binary_cross_entropy_with_logits(x, y, y),
        lambda x=x, y=y: fusedloss.kl_div(x, y, reduction="sum"),
        lambda x=x, y=y, w=weight: fusedloss.cross_entropy(x, y, w, label_smoothing=0.1),
        lambda x=x, l=labels, w=weight: fusedloss.cross_entropy(x.t().contiguous().t(), l, w),
        lambda x=few, l=labels: fusedloss.cross_entropy(x, l),
        lambda x=x, l=labels: fusedloss.nll_loss(x, l),
        lambda x=x, y=y: fusedloss.triplet_margin_loss(x, y, x + 1, p=3, swap=True),
    ]
made = []
for size in (256, 64):
    threading.stack_size(size * 1024)
    thread = threading.Thread(target=lambda: made.append([call() for call in losses]))
    thread.start()
    thread.join()
print(len(made))
"""


def test_threads_of_small_stacks() -> None:
    done = run_python(SMALL_STACK)
    assert done.stdout == "2\n", (done.returncode, done.stderr)


PEAK = """
import resource, torch, fusedloss
x = torch.randn(2**21, 2).t()
labels = torch.tensor([1, 2])
fusedloss.cross_entropy(x[:, :9].clone().requires_grad_(), labels).backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
fusedloss.cross_entropy(x.requires_grad_(), labels).backward()
print((peak() - before) // x.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB")
def test_few_rows_of_many_classes_take_little_scratch() -> None:
    """The gradient, and as much beside it at most: a tile of sixteen rows would take eight times that."""
    done = run_python(PEAK)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 3


# More than 2**31 elements: each takes up to 5 GiB, and a minute

BEYOND = 2**31 + 5
large = pytest.mark.large


@large
def test_large_pointwise() -> None:
    x = torch.zeros(BEYOND, dtype=torch.bfloat16)
    x[-1] = 3
    t = torch.zeros((), dtype=torch.bfloat16).expand(BEYOND)
    assert fusedloss.mse_loss(x, t, reduction="sum").item() == 9


@large
def test_large_gradient() -> None:
    x = torch.full((), 2.0, dtype=torch.bfloat16).expand(BEYOND).detach().requires_grad_()
    t = torch.zeros((), dtype=torch.bfloat16).expand(BEYOND)
    (grad,) = torch.autograd.grad(fusedloss.mse_loss(x, t, reduction="sum"), x)
    assert grad.shape == x.shape
    assert grad.min().item() == grad.max().item() == 4


@large
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_large_rows(name: str) -> None:
    logits = torch.tensor([[0.0, 1.0]]).log_softmax(1)
    x = logits.expand(BEYOND, 2)
    y = torch.zeros(BEYOND, dtype=torch.uint8)
    y[-1] = 1
    function = getattr(fusedloss, name)
    expected = -((BEYOND - 1) * logits[0, 0].double() + logits[0, 1].double()).item()
    assert function(x, y, reduction="sum").item() == pytest.approx(expected, rel=1e-6)
    y[-1] = 2
    with pytest.raises(IndexError, match=rf"target\[{BEYOND - 1}\] = 2"):
        function(x, y)


@large
def test_large_triplet() -> None:
    rows = BEYOND // 2 + 1
    a, p, n = (torch.tensor([[v, v]]).expand(rows, 2) for v in (0.0, 3.0, 1.0))
    single = fusedloss.triplet_margin_loss(a[:1], p[:1], n[:1]).item()
    assert fusedloss.triplet_margin_loss(a, p, n).item() == pytest.approx(single, rel=1e-6)
