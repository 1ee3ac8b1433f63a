# Printed by tests/stubs.py.

from . import distributed as distributed
from . import functional as functional
from . import nn as nn
from ._functions import *
from ._modules import *
from .core.levels import checks as checks
from .core.trace import Route as Route
from .core.trace import explain as explain
from .engines.gpu import synchronize as synchronize
from .lazy.heads import lazy_head as lazy_head
from .lazy.heads import lazy_heads as lazy_heads
from .lazy.tensor import LazyLogits as LazyLogits
from .lazy.tensor import LazyLogitsWarning as LazyLogitsWarning
from .patch import patch as patch
from .patch import patched as patched
from .patch import unpatch as unpatch

__version__: str
