"""The GPU kernels: the same formulas through Triton, one engine for each family of calls.

Importing this package imports no Triton; the first call on a GPU does.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .available import HOST, Failed, import_problem, interpreted, problem, serves, turn_off

if TYPE_CHECKING:
    from ..protocol import Engine

__all__ = [
    "HOST",
    "Failed",
    "engine_of",
    "family",
    "interpreted",
    "problem",
    "serves",
    "synchronize",
    "turn_off",
]


def family(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


@functools.cache
def engine_of(kind: str) -> Engine[Any]:
    """Of calls of a kind."""
    from .ctc import CtcEngine
    from .dice import DiceEngine
    from .margins import MarginEngine
    from .pointwise import PointwiseEngine
    from .reduction import ReductionEngine
    from .rows import RowsEngine

    kinds: dict[str, type[Engine[Any]]] = {
        "ctc": CtcEngine,
        "dice": DiceEngine,
        "margins": MarginEngine,
        "pointwise": PointwiseEngine,
        "rows": RowsEngine,
        "reduction": ReductionEngine,
    }
    return kinds[kind]()


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
    if import_problem() is None:
        family("flags").raise_all()
