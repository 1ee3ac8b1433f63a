#!/usr/bin/env bash
# Compiled, an autograd.Function that saves an input reads in backward what was written over that input afterwards.
#
# A good guess is that torch.compile raises ("modified by an inplace operation"), as eager autograd does, and as it does itself
# for torch's own operations. torch 2.13 hands the later value to the backward of an autograd.Function, and the gradient
# is silently wrong.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import torch


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    def backward(ctx, incoming):
        (a,) = ctx.saved_tensors
        return 2 * a * incoming


def program(square):
    def run(x):
        z = x * 1
        total = square(z).sum()
        z.zero_()
        return total

    return run


print("torch", torch.__version__)
found = {}
for name, square in (("torch's own", torch.square), ("autograd.Function", Square.apply)):
    for how in ("eager", "compiled"):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        run = program(square)
        run = torch.compile(run, backend="aot_eager") if how == "compiled" else run
        try:
            run(x).backward()
            found[name, how] = x.grad.tolist()
        except RuntimeError as error:
            found[name, how] = "raises: modified" if "modified by an inplace" in str(error) else error
        print(f"{name}, {how}: {found[name, how]}")
assert found["torch's own", "eager"] == found["autograd.Function", "eager"] == "raises: modified"
assert found["autograd.Function", "compiled"] == [0.0, 0.0]
PY
"$work/venv/bin/python" "$work/program.py"
