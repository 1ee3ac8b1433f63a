"""Triton's interpreter, mended where it differs from a GPU: for tests and `fusedloss verify`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def mend() -> None:
    """Conversions to bfloat16 round to nearest, from any type; a GPU knows no floating point warnings."""
    np.seterr(all="ignore")
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, to: Any) -> Any:
        here, there = source.dtype.scalar, to.scalar
        if here is tl.bfloat16 and there is not tl.bfloat16:
            wide = torch.from_numpy(source.data.view(np.int16).copy()).view(torch.bfloat16).float()
            return original(self, interpreter.TensorHandle(wide.numpy(), tl.float32), to)
        if there is tl.bfloat16 and here is not tl.bfloat16:
            near = torch.from_numpy(np.asarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(near.view(torch.int16).numpy().view(np.uint16), there)
        return original(self, source, to)

    interpreter.InterpreterBuilder.cast_impl = cast
