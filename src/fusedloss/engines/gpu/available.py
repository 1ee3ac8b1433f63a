"""Whether the GPU kernels run, and for which tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator

from torch import Tensor

from ...core import errors, torch_state

HOST, INTERPRETED = -1, -2  # in place of the number of a GPU
host = HOST  # what CPU tensors are on
# By family: a kernel that does not compile says little of the others.
failures: dict[str, str] = {}


class Failed(Exception):
    """Triton cannot compile or launch a kernel."""


@functools.cache
def import_problem() -> str | None:
    """Why there is no Triton, or None."""
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"cannot import triton: {type(error).__name__}: {error}"
    return None


@torch_state.constant
def problem(family: str | None = None) -> str | None:
    """Why there are no GPU kernels of a family, or of any; or None."""
    found = failures.get(family) if family else next(iter(failures.values()), None)
    return found or import_problem()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, the kernels are for CPU tensors too: Triton interprets them under TRITON_INTERPRET=1."""
    global host
    if os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module(".interpreter", __package__).mend()
    before, host = host, INTERPRETED
    try:
        yield
    finally:
        host = before


def serves(tensor: Tensor | None) -> bool:
    """Whether a kernel for this tensor would be one of Triton's."""
    return host is INTERPRETED or (tensor is not None and tensor.is_cuda)


def turn_off(failed: Failed, family: str) -> None:
    """From now on the formula runs on the GPU, for the losses of a family."""
    failures[family] = f"Triton failed: {failed}"
    words = f"Losses on the GPU of this kind ({family}) take the formula from now on."
    errors.warn(f"fusedloss: {failures[family]}. {words}")
