"""Loss functions for PyTorch: drop-in for `torch.nn`, fused, exact and honest.

`from fusedloss import nn` in place of `from torch import nn`.
"""

import gc

# An import makes nothing to collect, and to look through all of torch's objects takes as long again.
_collects = gc.isenabled()
gc.disable()
try:
    from . import distributed, functional, nn
    from .core.levels import checks
    from .core.trace import Route, explain
    from .engines.gpu import synchronize
    from .front import modules as _modules
    from .lazy import LazyLogits, LazyLogitsWarning, lazy_head, lazy_heads
    from .losses import *  # noqa: F403
    from .losses import __all__ as _losses
    from .patch import patch, patched, unpatch
finally:
    if _collects:
        gc.enable()

__version__ = "0.1.0"

globals().update(_modules.MODULES)
__all__ = [
    *_losses,
    *_modules.MODULES,
    "LazyLogits",
    "LazyLogitsWarning",
    "Route",
    "checks",
    "distributed",
    "explain",
    "functional",
    "lazy_head",
    "lazy_heads",
    "nn",
    "patch",
    "patched",
    "synchronize",
    "unpatch",
]
