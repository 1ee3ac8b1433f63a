"""Loss functions for PyTorch: drop-in for `torch.nn`, fused, exact and honest.

`from fusedloss import nn` in place of `from torch import nn`.
"""

from . import functional, nn
from .core.levels import checks
from .core.trace import Route, explain
from .engines.gpu import synchronize
from .losses import *  # noqa: F403
from .losses import __all__ as _losses
from .nn import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    KLDivLoss,
    MSELoss,
    NLLLoss,
    TripletMarginLoss,
    TripletMarginWithDistanceLoss,
)
from .patch import patch, patched, unpatch

__version__ = "0.1.0"

__all__ = [
    *_losses,
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "MSELoss",
    "NLLLoss",
    "Route",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
    "checks",
    "explain",
    "functional",
    "nn",
    "patch",
    "patched",
    "synchronize",
    "unpatch",
]

if "LinearCrossEntropyLoss" in nn.OWN:  # torch has it since 2.13
    LinearCrossEntropyLoss = nn.LinearCrossEntropyLoss
    __all__ += ["LinearCrossEntropyLoss"]
