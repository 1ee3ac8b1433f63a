#!/usr/bin/env bash
# MONAI's DiceFocalLoss(softmax=True) adds the focal loss of sigmoids, and in float32.
#
# The setting reads as that of the whole loss, and FocalLoss has its own, `use_softmax`. A good guess is that the one sets the
# other. MONAI 1.6.1 takes the softmax for Dice alone: the focal part is that of sigmoids, five times as large here. FocalLoss
# itself, given float64, computes and answers in float32.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps monai==1.6.1
cat > "$work/program.py" <<'PY'
import monai
import torch
from monai.losses import DiceFocalLoss, DiceLoss, FocalLoss

print("monai", monai.__version__)
x = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
y = torch.tensor([[[1, 0]]])
both, dice = (L(softmax=True, to_onehot_y=True)(x, y) for L in (DiceFocalLoss, DiceLoss))
softmax, sigmoid = (FocalLoss(use_softmax=s, to_onehot_y=True)(x, y) for s in (True, False))
print(f"its focal part {both - dice:.6f}, of sigmoids {sigmoid:.6f}, of the softmax {softmax:.6f} ({softmax.dtype})")
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$found" = "monai 1.6.1
its focal part 0.295795, of sigmoids 0.295795, of the softmax 0.055556 (torch.float32)"
