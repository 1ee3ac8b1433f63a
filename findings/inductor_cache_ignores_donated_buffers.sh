#!/usr/bin/env bash
# Inductor's graph cache hands a backward that overwrites its saved tensors to a run that keeps the graph.
#
# By default torch.compile lets backward write into tensors saved for it ("donated buffers"), and refuses retain_graph=True
# then, naming the setting that turns this off: torch._functorch.config.donated_buffer. A good guess is that a model compiled
# after the change is compiled anew. torch 2.13 finds the earlier graph in its cache, whose key does not hold the setting: the
# second and third backward of a kept graph give other gradients than the first, without a word. Without the cache all agree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
import torch._functorch.config as config


def step(x, y):
    return (x @ y).exp().sum()


torch.manual_seed(0)
x, y = torch.randn(64, 64).div(8).requires_grad_(), torch.randn(64, 64).div(8)
for donated in (True, False):
    torch._dynamo.reset()
    with config.patch(donated_buffer=donated):
        loss = torch.compile(step)(x, y)
        incoming = torch.tensor(2.0)
        times = 1 if donated else 3
        found = [torch.autograd.grad(loss, x, incoming, retain_graph=not donated)[0] for _ in range(times)]
print("kept graphs agree:", all(torch.allclose(found[0], each) for each in found[1:]))
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__.split("+")[0])'
run() {
  env TORCHINDUCTOR_CACHE_DIR="$work/$1" "TORCHINDUCTOR_FX_GRAPH_CACHE=$2" TORCHINDUCTOR_AUTOGRAD_CACHE="$2" \
    "$work/venv/bin/python" "$work/program.py" 2>/dev/null
}
found="with the cache, $(run a 1)
without, $(run b 0)"
echo "$found"
test "$found" = "with the cache, kept graphs agree: False
without, kept graphs agree: True"
