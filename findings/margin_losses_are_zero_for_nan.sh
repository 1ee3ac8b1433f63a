#!/usr/bin/env bash
# multi_margin_loss and multilabel_margin_loss are 0 where the input is NaN.
#
# A loss of NaN tells that training went wrong. A good guess is that these give it too, as the hinge of torch.clamp does;
# but their kernels add a term where it is above 0, which NaN is not: torch 2.13 reports a perfect model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
from torch.nn import functional as F

x = torch.full((1, 3), torch.nan)
print("multi_margin_loss", F.multi_margin_loss(x, torch.tensor([0])).item())
print("multilabel_margin_loss", F.multilabel_margin_loss(x, torch.tensor([[0, -1, -1]])).item())
print("hinge_embedding_loss", F.hinge_embedding_loss(x, -torch.ones(1, 3)).item())
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$found" = "multi_margin_loss 0.0
multilabel_margin_loss 0.0
hinge_embedding_loss nan"
