#!/usr/bin/env bash
# mse_loss and binary_cross_entropy of sharded DTensors: the gradient of their mean is multiplied by the number of ranks.
#
# A good guess is that a loss of DTensors is that of the whole tensors, as its value is here. But the backward of torch 2.13
# divides by the number of elements of the own shard: on two processes every gradient is twice the right one, silently.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
rank = dist.get_rank()
torch.manual_seed(0)
x, t = torch.rand(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
for loss in (F.mse_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits):
    whole = x.clone().requires_grad_()
    value = loss(whole, t)
    value.backward()
    spread = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    found = loss(spread, distribute_tensor(t, mesh, [Shard(0)]))
    found.backward()
    ratio = (spread.grad.full_tensor() / whole.grad).mean().item()
    torch.testing.assert_close(found.full_tensor(), value)
    if rank == 0:
        print(loss.__name__, f"gradient is {ratio:.3f} of the right one")
    assert abs(ratio - (1 if loss is F.binary_cross_entropy_with_logits else 2)) < 1e-9
dist.destroy_process_group()
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 "$work/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$work/program.py"
