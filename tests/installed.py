"""Whether an installed fusedloss runs: every row of the registry by its kernel. `python installed.py [FOLDER]`

With a folder, it must be the one installed there.
"""

import sys
import time

import torch

start = time.perf_counter()
import fusedloss  # noqa: E402

seconds = time.perf_counter() - start
from fusedloss.engines.cpu import load  # noqa: E402
from fusedloss.front.definition import REGISTRY  # noqa: E402

assert fusedloss.__file__.startswith(tuple(sys.argv[1:]) or ""), fusedloss.__file__
assert not load.problem() and not load.one_thread(), (load.problem(), load.one_thread())
for key, row in REGISTRY.items():
    generator = torch.Generator().manual_seed(0)
    tensors = row.example((6, 5), torch.float32, generator)
    tensors = tuple(t.requires_grad_(k in row.differentiable) for k, t in enumerate(tensors))
    options = next(iter(row.options.values()))(tensors, generator)
    row.reduced(*tensors, **options).sum().backward()
    assert fusedloss.explain(row.function, *tensors, **options).kernel, key
print(
    f"{len(REGISTRY)} losses run by {load.path().name}; import fusedloss takes {1e3 * seconds:.0f} ms beyond "
    "torch's"
)
