#!/usr/bin/env bash
# torch.where of two Python numbers is float32, whatever it is multiplied with.
#
# In a formula of float64 tensors, `torch.where(x > 0, 0.9, 0.1)` looks as exact as `0.9 * x`: a number beside a tensor
# takes the tensor's type. A good guess is that it does so here. But no operand of `where` is a floating tensor, so torch
# takes the default type, float32, rounds 0.9 to it, and hands the digits that are lost on to the float64 product.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch

x = torch.tensor([0.3], dtype=torch.float64)
slope = torch.where(x > 0, 0.9, 0.1)
product = slope * x
print(f"{slope.dtype}; {product.dtype} {product.item():.12f}, of numbers {0.9 * 0.3:.12f}")
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
found=$("$work/venv/bin/python" "$work/program.py")
echo "$found"
test "$found" = "torch.float32; torch.float64 0.269999992847, of numbers 0.270000000000"
