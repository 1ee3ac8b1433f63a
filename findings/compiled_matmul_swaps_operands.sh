#!/usr/bin/env bash
# torch.compile multiplies an object that has __torch_function__ by a tensor in the wrong order.
#
# An object that is no tensor may stand before one in `a @ b`: called, its __torch_function__ or __matmul__ gets a and b. Traced
# by torch 2.13's dynamo, the operands are swapped, as for operators that have a reversed method, and the method is not the
# reversed one: of square matrices the result is that of b @ a, without a word. `-`, `/`, `<` and torch.matmul keep the order.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$work/program.py" <<'PY'
import operator

import torch


class Held:
    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*(a.value if isinstance(a, Held) else a for a in args))

    def __matmul__(self, other):
        return self.value @ other

    def __sub__(self, other):
        return self.value - other


print("torch", torch.__version__.split("+")[0])
a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [2.0, 5.0]])
for name in ("sub", "matmul"):
    f = getattr(operator, name)

    def step(x, y):
        return f(Held(x), y)

    called, traced = step(a, b), torch.compile(step, backend="eager", fullgraph=True)(a, b)
    print(name, torch.equal(called, f(a, b)), torch.equal(traced, f(a, b)), torch.equal(traced, f(b, a)))
f = torch.matmul
traced = torch.compile(lambda x, y: torch.matmul(Held(x), y), backend="eager", fullgraph=True)(a, b)
print("torch.matmul", torch.equal(traced, a @ b))
PY
found=$("$work/venv/bin/python" "$work/program.py" 2>/dev/null)
echo "$found"
test "$found" = "torch 2.13.0
sub True True False
matmul True False True
torch.matmul True"
