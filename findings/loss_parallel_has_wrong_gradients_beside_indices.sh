#!/usr/bin/env bash
# Under loss_parallel(), cross_entropy with class probabilities and nll_loss have right values and wrong gradients.
#
# A good guess is that inside of the context manager, which is for class-sharded logits, every loss that does not raise is
# right. But the backward of log_softmax there is that of cross entropy with class indices alone: in torch 2.13 it leaves
# out the sum over the classes of what arrives, whoever sends it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
x = torch.randn(4, 6, dtype=torch.float64)
indices, q, log_p = torch.tensor([0, 5, 2, 3]), x.flip(0).softmax(1), x.log_softmax(1)
cases = (
    ("cross_entropy, class indices", F.cross_entropy, x, indices, Replicate(), True),
    ("cross_entropy, probabilities", F.cross_entropy, x, q, Shard(1), False),
    ("nll_loss", F.nll_loss, log_p, indices, Replicate(), False),
)
for name, loss, given, target, placement, right in cases:
    whole = given.clone().requires_grad_()
    value = loss(whole, target)
    value.backward()
    spread = distribute_tensor(given, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel():
        found = loss(spread, distribute_tensor(target, mesh, [placement]))
        found.backward()
    torch.testing.assert_close(found.full_tensor(), value)
    apart = (spread.grad.full_tensor() - whole.grad).abs().max().item()
    if dist.get_rank() == 0:
        print(f"{name}: gradient off by {apart:.2g}")
    assert (apart < 1e-12) is right
dist.destroy_process_group()
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 "$work/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$work/program.py"
