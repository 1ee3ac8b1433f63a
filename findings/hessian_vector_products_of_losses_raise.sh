#!/usr/bin/env bash
# A Hessian-vector product, forward mode over backward, raises for PyTorch's mean squared error, Huber and soft margin loss.
#
# `torch.func.jvp(torch.func.grad(f), ...)` is what PyTorch's tutorial gives for it. Huber and soft margin loss have
# a backward without forward mode. For mean squared error, of all losses the simplest, forward mode is there; a good guess
# is that it serves each reduction. With 'mean' torch 2.13 writes into the zero that stands for the target's absent
# tangent, and refuses that; 'sum', and `torch.func.hessian` (the same, vectorised), work.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
from torch.nn import functional as F

x, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
t = torch.tensor([1.0, -1.0])


def outcome(name, **settings):
    loss = lambda x: getattr(F, name)(x, t, **settings)
    try:
        found = torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1].tolist()
        return f"{name} {found}"
    except (RuntimeError, NotImplementedError) as error:
        return f"{name} {type(error).__name__}: {str(error)[:24]}"


print(outcome("mse_loss", reduction="sum"))
print(outcome("mse_loss"))
print(outcome("huber_loss"))
print(outcome("soft_margin_loss"))
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$found" = "mse_loss [6.0, 10.0]
mse_loss RuntimeError: ZeroTensors are immutabl
huber_loss NotImplementedError: Trying to use forward AD
soft_margin_loss NotImplementedError: Trying to use forward AD"
