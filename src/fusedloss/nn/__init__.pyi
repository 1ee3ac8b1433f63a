# Printed by tests/stubs.py.

MYPY: bool
if MYPY:
    from .._modules import *
    from . import functional as functional
from torch.nn import *  # type: ignore[assignment, no-redef]

if not MYPY:
    from .._modules import *
    from . import functional as functional
