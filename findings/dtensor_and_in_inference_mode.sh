#!/usr/bin/env bash
# In inference mode a & b, a | b and a ^ b of DTensors are a, silently; under no_grad they are right.
#
# A good guess is that inference mode changes what is recorded and not what is computed. torch 2.13's DTensor takes
# aten.__and__ and its kin for operations in place, their names ending in an underscore, and gives the first operand back.
# Masks made of two conditions are then wrong: of counted and valid labels, say.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

print("torch", torch.__version__)
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    a, b = (
        distribute_tensor(torch.tensor(values), mesh, [Replicate()])
        for values in ([True, True, False, False], [True, False, True, False])
    )
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = [c.to_local().int().tolist() for c in (a & b, a | b, a ^ b)]
        print(mode.__name__, *found)
        if mode is torch.no_grad:
            assert found == [[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]]
        else:
            assert found == [[1, 1, 0, 0]] * 3
    dist.destroy_process_group()
PY
"$work/venv/bin/python" "$work/program.py"
