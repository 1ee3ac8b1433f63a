#!/usr/bin/env bash
# torch.onnx.export(dynamo=True) of a cross entropy with label smoothing writes a model that does not smooth.
#
# A good guess is that what ONNX's SoftmaxCrossEntropyLoss cannot say is decomposed, or refused. torch 2.13 writes the node
# and drops `label_smoothing`; the model runs, and gives the loss without smoothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.2.6 flatbuffers==25.12.19 ml-dtypes==0.6.0 onnx-ir==1.1.0 onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 protobuf==7.36.2
cat > "$work/program.py" <<'PY'
import sys

import onnxruntime
import torch
from torch.nn import functional as F


class Smoothed(torch.nn.Module):
    def forward(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.2)


x, y = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]]), torch.tensor([0, 1])
torch.onnx.export(Smoothed(), (x, y), sys.argv[1], dynamo=True, verbose=False)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
given = dict(zip([i.name for i in session.get_inputs()], (x.numpy(), y.numpy())))
found = float(session.run(None, given)[0])
smoothed, plain = float(Smoothed()(x, y)), float(F.cross_entropy(x, y))
print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
print(f"with smoothing {smoothed:.5f}, without {plain:.5f}, exported {found:.5f}")
assert abs(smoothed - plain) > 0.01 and abs(found - plain) < 1e-5
PY
"$work/venv/bin/python" "$work/program.py" "$work/model.onnx" 2>/dev/null
