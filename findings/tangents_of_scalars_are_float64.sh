#!/usr/bin/env bash
# Under torch.func.jvp, a 0-dim float32 tensor times or over a Python number has a float64 tangent.
#
# A good guess is that a tangent has the type of its primal, as it has for tensors with dimensions and in reverse mode.
# In torch 2.13 the tangent of a 0-dim product or quotient with a number is float64, beside a float32 primal.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch

print("torch", torch.__version__)
found = {}
for name, f in (("a * 3.0", lambda a: a * 3.0), ("a / 3.0", lambda a: a / 3.0)):
    for shape in ((), (1,)):
        a = torch.ones(shape)
        value, tangent = torch.func.jvp(f, (a,), (a,))
        found[name, shape] = value.dtype, tangent.dtype
        print(f"{name}, shape {shape}: {value.dtype}, tangent {tangent.dtype}")
single, double = torch.float32, torch.float64
assert all(kinds == (single, single if shape else double) for (_, shape), kinds in found.items())
PY
"$work/venv/bin/python" "$work/program.py"
