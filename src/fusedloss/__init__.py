"""Loss functions for PyTorch: drop-in for `torch.nn`, fused, exact and honest.

`from fusedloss import nn` in place of `from torch import nn`.
"""

import gc
from typing import Any

# An import makes nothing to collect, and to look through all of torch's objects takes as long again.
_collects = gc.isenabled()
gc.disable()
try:
    from . import distributed, functional, nn
    from .core.levels import checks
    from .core.trace import Route, explain
    from .engines.gpu import synchronize
    from .front import modules as _modules
    from .losses import *  # noqa: F403
    from .losses import __all__ as _losses
    from .patch import patch, patched, unpatch
finally:
    if _collects:
        gc.enable()

__version__ = "0.1.0"

# Few programs need their rules.
_LAZY = ("LazyLogits", "LazyLogitsWarning", "lazy_head", "lazy_heads")
globals().update(_modules.MODULES)
__all__ = [
    *_losses,
    *_modules.MODULES,
    *_LAZY,
    "Route",
    "checks",
    "distributed",
    "explain",
    "functional",
    "nn",
    "patch",
    "patched",
    "synchronize",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fusedloss' has no attribute {name!r}")
    from . import lazy

    globals().update({each: getattr(lazy, each) for each in _LAZY})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
