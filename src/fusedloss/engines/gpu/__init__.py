"""The GPU kernels: the same formulas through Triton, one module for each kernel family.

Importing this package imports no Triton; the first call on a GPU does.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from ...core import errors, torch_state

on_cpu = (
    False  # tests set it: Triton interprets the kernels on CPU tensors, under TRITON_INTERPRET=1
)
_failures: dict[
    str, str
] = {}  # by family: a kernel that does not compile says little of the others


class Failed(Exception):
    """Triton cannot compile or launch a kernel."""


@functools.cache
def _import() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"cannot import triton: {type(error).__name__}: {error}"
    return None


@torch_state.constant
def problem(family: str | None = None) -> str | None:
    """Why there are no GPU kernels of a family, or of any; or None."""
    found = _failures.get(family) if family else next(iter(_failures.values()), None)
    return found or _import()


def serves(tensor: Tensor | None) -> bool:
    """Whether a kernel for this tensor would be one of Triton's."""
    return on_cpu or (tensor is not None and tensor.is_cuda)


def family(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


def turn_off(failed: Failed, family: str) -> None:
    """From now on the formula runs on the GPU, for the losses of a family."""
    _failures[family] = f"Triton failed: {failed}"
    words = f"Losses on the GPU of this kind ({family}) take the formula from now on."
    errors.warn(f"fusedloss: {_failures[family]}. {words}")


def synchronize() -> None:
    """Waits for the GPUs in use, and raises what their kernels found wrong.

    A class index that is out of range, or a probability outside [0, 1], does not stop a kernel on the
    GPU, nor does the call wait to learn of it: the loss is NaN, and the error is raised at the next
    call or backward of this library after the kernel has run, or here.

    Raises:
        IndexError: a class index out of range; its position is named.
        RuntimeError: a probability outside [0, 1]; likewise.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if _import() is None:
        family("flags").raise_all()
