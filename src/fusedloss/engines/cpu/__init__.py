"""The CPU kernels: one C++ source, a library for each CPU capability, called through its C ABI."""

from . import again, pointwise, rows, triplet
from .load import capability, library, one_thread, problem

__all__ = [
    "again",
    "capability",
    "library",
    "one_thread",
    "pointwise",
    "problem",
    "rows",
    "triplet",
]
