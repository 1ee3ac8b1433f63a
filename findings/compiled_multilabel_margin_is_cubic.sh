#!/usr/bin/env bash
# Compiled, PyTorch's multilabel margin loss takes hundreds of times what it takes when it is called.
#
# A good guess is that torch.compile makes a loss faster, or leaves it as it is. Inductor takes multilabel_margin_loss apart
# into one comparison of every label with every class, whose operations it computes anew for each pair: with 512 classes
# forward and backward take more than 20 times what eager takes, the more classes the more. No warning says so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import statistics
import time

import torch
from torch.nn import functional as F

torch.set_num_threads(1)


def step(function, x, target):
    start = time.perf_counter()
    function(x, target).backward()
    return time.perf_counter() - start


compiled = torch.compile(F.multilabel_margin_loss, dynamic=False)
for classes in (128, 512):
    torch.manual_seed(0)
    x = torch.randn(64, classes, requires_grad=True)
    target = torch.full((64, classes), -1)
    target[:, :8] = torch.rand(64, classes).argsort(1)[:, :8]
    called, fused = F.multilabel_margin_loss(x, target), compiled(x, target)
    assert torch.allclose(called, fused)
    ratios = []
    for _ in range(5):
        ratios.append(step(compiled, x, target) / step(F.multilabel_margin_loss, x, target))
    ratio = statistics.median(ratios[1:])
    print(f"64 x {classes}: the compiled one takes {ratio:.0f} times as long")
    wrong = ratio > 20
print("more than 20 times at 512 classes:", wrong)
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__.split("+")[0])'
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$(echo "$found" | tail -1)" = "more than 20 times at 512 classes: True"
