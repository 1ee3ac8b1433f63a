"""The CPU kernels: one C++ source, a library for each CPU capability, called through its C ABI."""

from typing import Any

from ..protocol import Engine
from .ctc import CtcEngine
from .dice import DiceEngine
from .load import capability, library, one_thread, problem
from .margins import MarginEngine
from .pointwise import PointwiseEngine
from .reduction import ReductionEngine
from .rows import RowsEngine

ENGINES: dict[str, Engine[Any]] = {
    "ctc": CtcEngine(),
    "margins": MarginEngine(),
    "dice": DiceEngine(),
    "pointwise": PointwiseEngine(),
    "reduction": ReductionEngine(),
    "rows": RowsEngine(),
}  # by the family of a call

__all__ = ["ENGINES", "capability", "library", "one_thread", "problem"]
