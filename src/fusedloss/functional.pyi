# Printed by tests/stubs.py.

MYPY: bool
if MYPY:
    from ._functions import *
from torch.nn.functional import *  # type: ignore[assignment]

if not MYPY:
    from ._functions import *
