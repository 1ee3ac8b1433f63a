#!/usr/bin/env bash
# The derivative of gaussian_nll_loss by a variance below eps is 0 forward and large backward.
#
# The variance is clamped to eps so that autograd does not see it: backward takes the derivative at eps. A good guess is that
# forward mode takes the same. torch 2.13 clamps a copy in place, whose tangent is clamped away.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
from torch.nn import functional as F

mean, target, var = torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1e-3])
loss = lambda var: F.gaussian_nll_loss(mean, target, var, eps=0.1, reduction="sum")
forward = torch.func.jvp(loss, (var,), (torch.ones(1),))[1]
print(f"forward {forward.item():.3f}, backward {torch.func.grad(loss)(var).item():.3f}")
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$found" = "forward 0.000, backward 5.000"
