"""The ways in. What runs a call is imported with the first one: it takes as long as all the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def dispatch(*call: Any) -> Tensor:
    """See :func:`fusedloss.route.dispatch.dispatch`."""
    from .dispatch import dispatch

    return dispatch(*call)


def dispatch_head(*call: Any) -> Any:
    """See :func:`fusedloss.route.heads.dispatch`."""
    from .heads import dispatch

    return dispatch(*call)
