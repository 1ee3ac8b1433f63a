"""Heads whose logits never exist, of models that know nothing of it."""

from . import consumed, numbers, rows  # noqa: F401  (their rules)
from .consumed import of_tensors as _of_tensors
from .heads import Handle, lazy_head, lazy_heads
from .tensor import LazyLogits, LazyLogitsWarning

__all__ = ["Handle", "LazyLogits", "LazyLogitsWarning", "lazy_head", "lazy_heads"]

_of_tensors()
