#!/usr/bin/env bash
# torch.compile's cache on disk does not see that a function of torch.nn.functional was replaced.
#
# Two processes compile the same program; the first has given F.kl_div's function object other code (as libraries
# that patch PyTorch do), the second is plain PyTorch. A good guess is that the cache's key covers the code that is
# traced. It does not: torch 2.13 keys AOTAutograd's cache by the graph of Dynamo, in which `kl_div` is a name, so
# the second process runs what the first compiled. The same with the processes in the other order. A tag in
# `torch.compiler.config.cache_key_tag` keeps them apart.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import sys
import torch
from torch.nn import functional as F

if "replaced" in sys.argv:
    def kl_div(input, target, size_average=None, reduce=None, reduction="mean", log_target=False):
        return input.sum() * 0.0 + 42.0

    F.kl_div.__code__ = kl_div.__code__
if "tag" in sys.argv:
    torch.compiler.config.cache_key_tag += "replaced" if "replaced" in sys.argv else ""
x, t = torch.tensor([-1.0, -0.5]), torch.tensor([0.4, 0.6])
print(f"{torch.compile(lambda x, t: F.kl_div(x, t, reduction='sum'))(x, t).item():.4f}")
PY
run() { TORCHINDUCTOR_CACHE_DIR="$work/$1" "$work/venv/bin/python" "$work/program.py" "${@:2}" 2>/dev/null; }
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
found="$(run a replaced) $(run a plain), $(run b plain) $(run b replaced), with a tag $(run c replaced tag) $(run c plain tag)"
echo "replaced, then plain; plain, then replaced: $found"
test "$found" = "42.0000 42.0000, 0.0270 0.0270, with a tag 42.0000 0.0270"
