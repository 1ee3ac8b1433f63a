"""What torch.compile keeps on disk serves patched functions, plain ones and each of our versions apart."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch._inductor.utils
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fusedloss
from fusedloss.core import caches

CONFIG = torch.compiler.config
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# PyTorch's loss of a class near certainty is 0; ours keeps its digits.
NEAR_CERTAIN = torch.tensor([[40.0, 0.0]]), torch.tensor([0])
OURS = torch.tensor(-40.0).exp().item()


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    fusedloss.unpatch()
    CONFIG.cache_key_tag = ""


def test_the_tag_is_the_users_before_between_and_after() -> None:
    fusedloss.patch()
    assert CONFIG.cache_key_tag == caches.own()
    CONFIG.cache_key_tag = "between"
    fusedloss.patch()
    with fusedloss.patched():
        assert CONFIG.cache_key_tag == "between" + caches.own()
    assert CONFIG.cache_key_tag == "between" + caches.own()
    with CONFIG.patch(cache_key_tag="within"):
        assert CONFIG.cache_key_tag == "within" + caches.own()
        fusedloss.unpatch()
        assert CONFIG.cache_key_tag == "within"
    fusedloss.unpatch()
    assert CONFIG.cache_key_tag == "between"
    with pytest.raises(ZeroDivisionError), fusedloss.patched():
        raise ZeroDivisionError
    assert CONFIG.cache_key_tag == "between"


def test_a_tag_that_is_saved_and_put_back_is_marked_once() -> None:
    CONFIG.cache_key_tag = "mine"
    with fusedloss.patched():
        with mock.patch.object(CONFIG, "cache_key_tag", "mocked"):
            assert CONFIG.cache_key_tag == "mocked" + caches.own()
        CONFIG.cache_key_tag = CONFIG.cache_key_tag
        assert CONFIG.cache_key_tag == "mine" + caches.own()
    assert CONFIG.cache_key_tag == "mine"


def test_every_thread_reads_the_mark() -> None:
    seen: list[str] = []

    def read() -> None:
        seen.append(CONFIG.cache_key_tag)

    with fusedloss.patched():
        inside = threading.Thread(target=read)
        inside.start()
        inside.join()
    outside = threading.Thread(target=read)
    outside.start()
    outside.join()
    assert seen == [caches.own(), ""]


# Nothing of C++ is compiled: a cache that begins empty would take a minute.
CHEAP = (
    {"fallback_by_default": True} if hasattr(torch._inductor.config, "fallback_by_default") else {}
)


def compiled() -> tuple[float, bool]:
    """The loss of PyTorch's function as compiled anew, and whether that came from the cache."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["aot_autograd"]
    before = counters["autograd_cache_hit"]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y)

    with torch._inductor.config.patch(CHEAP):  # settings are those of a thread
        found = torch.compile(loss)(*NEAR_CERTAIN).item()
    return found, counters["autograd_cache_hit"] > before


def in_a_thread(function: Callable[[], tuple[float, bool]]) -> tuple[float, bool]:
    found: list[tuple[float, bool]] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.slow
def test_patched_and_plain_share_nothing() -> None:
    with torch._inductor.utils.fresh_cache():
        assert compiled() == (0, False)
        fusedloss.patch()
        assert compiled() == (pytest.approx(OURS), False)
        assert compiled() == (pytest.approx(OURS), True)
        assert in_a_thread(compiled) == (pytest.approx(OURS), True)
        CONFIG.cache_key_tag = "mine"
        assert compiled() == (pytest.approx(OURS), False)
        CONFIG.cache_key_tag = ""
        fusedloss.unpatch()
        assert compiled() == (0, True)
        with mock.patch.object(caches, "own", lambda: "+fusedloss-of-another-version"):
            fusedloss.patch()
            assert compiled() == (pytest.approx(OURS), False)
            fusedloss.unpatch()


SCRIPT = """
import sys, torch
import torch._inductor.config
if hasattr(torch._inductor.config, "fallback_by_default"):
    torch._inductor.config.fallback_by_default = True
if sys.argv[1] == "patched":
    import fusedloss
    fusedloss.patch()
x, y = torch.tensor([[40.0, 0.0]], requires_grad=True), torch.tensor([0])
loss = torch.compile(lambda x, y: torch.nn.functional.cross_entropy(x, y))(x, y)
loss.backward()
print(loss.item(), x.grad[0, 1].item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [("patched", "plain"), ("plain", "patched")], ids="-".join)
def test_processes_share_nothing(order: tuple[str, ...], tmp_path: Path) -> None:
    """The second would die of an operator that it lacks, or run what the first one compiled."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for mode in order:
        command = [sys.executable, "-c", SCRIPT, mode]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loss, grad = map(float, done.stdout.split())
        assert loss == (pytest.approx(OURS) if mode == "patched" else 0)
        assert grad == pytest.approx(OURS)
