"""A loss with its options: a function of tensors alone."""

from __future__ import annotations

import functools
from collections.abc import Callable

from conftest import (
    Case,
    Options,
)
from torch import Tensor

SHAPE = (4, 5)
Function = Callable[..., Tensor]


def bound(case: Case, options: Options, reduction: str = "mean") -> Function:
    return functools.partial(case.function, **options, reduction=reduction)
