"""The CPU kernels: one C++ source, a library for each CPU capability, called through its C ABI."""

from . import pointwise, rows, triplet
from .load import capability, library, one_thread, problem

__all__ = ["capability", "library", "one_thread", "pointwise", "problem", "rows", "triplet"]
