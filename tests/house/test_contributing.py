"""The worked example in CONTRIBUTING.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.autograd import gradcheck

from fusedloss.core.reduce import resolve, result_dtype
from fusedloss.engines.cpu.printer import header
from fusedloss.front import definition as define
from fusedloss.kinds import torch_m as formula
from fusedloss.kinds.formula import Pointwise, apply
from fusedloss.kinds.pointwise import PointwiseCall
from fusedloss.route import dispatch

TEXT = (Path(__file__).parent.parent.parent / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_worked_example() -> None:
    printed = header({"CONTRIBUTING.md": BLOCKS[0]})
    assert "struct huber {" in printed
    assert "math::abs((x - t))" in printed

    from fusedloss.core import errors

    names = dict(
        vars(define), m=formula, errors=errors, route=dispatch, PointwiseCall=PointwiseCall
    )
    names |= {"resolve": resolve, "result_dtype": result_dtype, "Pointwise": Pointwise}
    exec(BLOCKS[0], names)
    exec(BLOCKS[1], names)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    t = torch.full_like(x, 0.3)
    with torch.autograd.forward_ad.dual_level():  # has no kernel in this build: take the formula
        ours = names["huber_loss"](x, t, reduction="none", delta=0.5)
    theirs = torch.nn.functional.huber_loss(x, t, reduction="none", delta=0.5)
    torch.testing.assert_close(ours, theirs)
    huber = names["HUBER"]
    assert gradcheck(lambda x: apply(huber, (x, t), {"delta": 0.5}), (x,))
