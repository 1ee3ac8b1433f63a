#!/usr/bin/env bash
# The gradient of torch.expm1 is 0 from x = -17.4 down in float32 (-37.5 in float64), where it is exp(x).
#
# A good guess is that the derivative of expm1, which is written for its digits, keeps them: exp(-20) is 2.06e-9 and a
# normal number. torch 2.13 differentiates by the result plus 1, and the result has been rounded to -1 there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch

print("torch", torch.__version__)
for dtype, at in ((torch.float32, -20.0), (torch.float64, -40.0)):
    x = torch.tensor(at, dtype=dtype, requires_grad=True)
    torch.expm1(x).backward()
    print(f"{dtype}: d expm1({at:g}) = {x.grad.item():g}, exp({at:g}) = {x.detach().exp().item():g}")
    assert x.grad.item() == 0
PY
"$work/venv/bin/python" "$work/program.py"
