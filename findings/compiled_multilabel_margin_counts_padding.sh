#!/usr/bin/env bash
# Compiled, PyTorch's multilabel margin loss takes the padding of a label set for labels.
#
# The labels of a row end at its first -1, and what comes after does not count: so the page of the loss says, and so eager
# computes. A good guess is that torch.compile gives the same. torch 2.13 takes the loss apart for it, reads padding as class 0
# and adds its margins, without a word: the value is right only where the padding is empty.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
from torch.nn import functional as F

x = torch.tensor([[0.1, 0.2, 0.4, 0.8]], dtype=torch.float64)
for labels in ([3, 0, -1, -1], [3, 0, 1, 2]):
    target = torch.tensor([labels])
    called = F.multilabel_margin_loss(x, target)
    compiled = torch.compile(F.multilabel_margin_loss, dynamic=False)(x, target)
    print(f"labels {labels}: called {called:.3f}, compiled {compiled:.3f}")
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__.split("+")[0])'
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$found" = "labels [3, 0, -1, -1]: called 0.850, compiled 2.050
labels [3, 0, 1, 2]: called 0.000, compiled 0.000"
