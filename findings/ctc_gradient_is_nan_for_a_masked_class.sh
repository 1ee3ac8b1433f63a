#!/usr/bin/env bash
# ctc_loss gives a finite loss and a NaN gradient where a class that is no label has the log-probability -inf.
#
# Classes are masked so, before log_softmax, where an alphabet is not used whole. Their alignments are none, and a good guess is
# that their gradient is 0. torch 2.13 on the CPU subtracts an infinity from another; log_softmax's backward then spreads
# the NaN over the whole frame.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
from torch.nn import functional as F

logits = torch.tensor([0.0, 0.0, -torch.inf]).expand(2, 1, 3).clone().requires_grad_()
loss = F.ctc_loss(logits.log_softmax(2), torch.tensor([[1]]), [2], [1])
loss.backward()
print(round(loss.item(), 4), logits.grad[0, 0].tolist())
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$found" = "0.2877 [nan, nan, nan]"
