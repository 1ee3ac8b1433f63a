#!/usr/bin/env bash
# ctc_loss on the CPU takes other labels than those of a 1-D target that is not contiguous.
#
# Concatenated targets may be a column or every second element of something. A good guess is that strides are followed,
# as everywhere, or copied away. torch 2.13 follows them within a sequence, but not for where the next one begins: the first
# loss is right, the second that of another label, without an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
from torch.nn import functional as F

log_probs = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(3, 2, 4).contiguous()
every_second = torch.tensor([1, 2, 3, 3])[::2]
for target in (every_second, every_second.contiguous()):
    loss = F.ctc_loss(log_probs, target, [3, 3], [1, 1], reduction="none")
    print(target.tolist(), [round(x, 4) for x in loss.tolist()])
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$found" = "[1, 3] [3.8167, 2.9188]
[1, 3] [3.8167, 2.2256]"
