"""A loss with all its settings, free of its tensors: what a kernel runs, and its formula.

There is one class for each kernel family. The tensors travel beside a call, where autograd sees
them. A call is made anew each time and never changed; to freeze the classes would triple the time
that it takes.
"""

from .ctc import CtcCall
from .dice import DiceCall
from .margins import MarginCall
from .pointwise import PointwiseCall
from .reduction import ReductionCall
from .rows import RowsCall

Call = PointwiseCall | RowsCall | ReductionCall | CtcCall | DiceCall | MarginCall

__all__ = [
    "Call",
    "CtcCall",
    "DiceCall",
    "MarginCall",
    "PointwiseCall",
    "ReductionCall",
    "RowsCall",
]
