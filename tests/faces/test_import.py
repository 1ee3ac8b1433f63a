"""What `import fusedloss` brings, and what waits for the first call."""

from __future__ import annotations

from elsewhere import run_python

IMPORTS = """
import sys, torch
before = set(sys.modules)
import fusedloss
print(*{name.split(".")[0] for name in set(sys.modules) - before} - {"fusedloss"})
print("torch._dynamo" in sys.modules)
print(*{name for name in set(sys.modules) - before if name.startswith("fusedloss.")})
"""
# What the first call brings, or the first lazy head: as much as all the rest.
LATER = ("fusedloss.autograd", "fusedloss.cli", "fusedloss.engines.cpu", "fusedloss.lazy")


def test_import_brings_nothing_slow() -> None:
    done = run_python(IMPORTS)
    packages, dynamo, own = done.stdout.splitlines()
    assert not set(packages.split()) & {"triton", "sympy", "mpmath", "numpy", "rich"}, done
    assert dynamo == "False"
    assert not [name for name in own.split() if name.startswith(LATER)]


FIRST = """
import torch
from fusedloss import functional as F
x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
target = torch.tensor([0, 1, 2, 1])
for loss, others in ((F.linear_cross_entropy, (weight, target)), (F.cross_entropy, (target,))):
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    found, = torch.autograd.grad(compiled(x, *others), x)
    expected, = torch.autograd.grad(loss(x, *others), x)
    torch.testing.assert_close(found, expected)
"""


def test_the_first_call_may_be_a_compiled_one() -> None:
    done = run_python(FIRST)
    assert done.returncode == 0, done.stderr
