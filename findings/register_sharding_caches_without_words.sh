#!/usr/bin/env bash
# register_sharding: calls that differ in a str or bool argument share what was cached for the first of them.
#
# A good guess is that the placements which a registered function returns are those of the call, whose arguments it is
# given. But torch 2.13 keys its cache by the tensors and the first int argument: the second call below gets a pending sum
# in place of a pending maximum, and is silently wrong.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch
import torch.distributed as dist
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.experimental import register_sharding


@torch.library.custom_op("finding::reduced", mutates_args=())
def reduced(x: torch.Tensor, how: str) -> torch.Tensor:
    return x.sum() if how == "sum" else x.amax()


reduced.register_fake(lambda x, how: x.new_empty(()))


@register_sharding(torch.ops.finding.reduced.default)
def placements(x, how):
    return [([Replicate()], [Replicate(), None]), ([Partial(how)], [Shard(0), None])]


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
a = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
found = [reduced(a, how).full_tensor().item() for how in ("sum", "max")]
if dist.get_rank() == 0:
    print("sum and max of 0 to 3:", found)
assert found == [6.0, 4.0]
dist.destroy_process_group()
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 "$work/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$work/program.py"
