"""What a kernel can read: a plain tensor with memory of its own. The one place that says so.

Asked of every argument, of gradients that arrive in backward, and of what was saved for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import torch_state
from .errors import fail

PLAIN = (Tensor, torch.nn.Parameter)
FREED = "the storage of a tensor was freed"

# Asked at every call: bound here once.
_dispatch_modes = torch_state.dispatch_modes
_storage = torch_state.storage
_strided = torch.strided


class Unreadable(Exception):
    """A kernel was handed a tensor without memory: a call like an earlier one is checked anew."""


def gap(tensor: Tensor) -> str | None:
    """Why no kernel reads the tensor, so that the formula serves it, or None. What is freed nothing serves."""
    if type(tensor) not in PLAIN:
        return f"{type(tensor).__name__} is a tensor subclass"
    if not (tensor.is_cpu or tensor.is_cuda):
        return f"there are no kernels for {tensor.device.type} tensors"
    if tensor.layout is not _strided:
        return f"the layout is {tensor.layout}"
    if tensor.is_neg():
        return "a tensor has a lazy sign"
    try:
        if _storage(tensor) or not tensor.numel():
            return None
    except NotImplementedError:
        return "a tensor has no memory"
    if torch_state.is_functional(tensor):
        return "a functional tensor has no memory"
    return "a zero tensor has no memory" if tensor._is_zerotensor() else FREED


def taken(value: Any) -> Any:
    """What a loss takes for an argument: a plain tensor where a subclass adds nothing to its memory but a name,

    or is one of a collective, which is waited for; all else as it is.
    """
    kind: Any = type(value)
    if kind in PLAIN or not isinstance(value, Tensor) or torch_state.is_compiling():
        return value
    if hasattr(kind, "trigger_wait"):
        return value.clone() if value.requires_grad else kind.trigger_wait(value)
    own = kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    return value.as_subclass(Tensor) if own else value


def first_gap(tensors: Sequence[Tensor | None], everywhere: bool = False) -> str | None:
    """The same of several; `everywhere` torch operations serve where there are no kernels."""
    for tensor in tensors:
        if tensor is None or (
            everywhere
            and type(tensor) in PLAIN
            and not (tensor.is_cpu or tensor.is_cuda or tensor.is_meta)
        ):
            continue
        if why := gap(tensor):
            return why
    return None


def check(function: str, **tensors: Tensor | None) -> None:
    """Refuses a tensor whose storage was freed: PyTorch's operations would end the process.

    Raises:
        RuntimeError: there is one.
    """
    if torch_state.is_compiling() or torch_state.transforms_active() or torch_state.is_tracing():
        return
    for name, tensor in tensors.items():
        if tensor is not None and gap(tensor) is FREED:
            fail(
                RuntimeError,
                function,
                f"the storage of {name} was freed: {tensor.numel()} elements of {tensor.dtype}, shape "
                f"{list(tensor.shape)}, have no memory. untyped_storage().resize_(0) does so, and FSDP "
                "with it: gather the tensor first (unshard(), summon_full_params)",
            )


def is_plain(incoming: Tensor) -> bool:
    """Whether a kernel can read the gradient that arrives.

    A mapped or fake one has no memory, and neither has the zero that `sgn()` sends back.
    """
    if type(incoming) is not Tensor or _dispatch_modes() or incoming.is_neg():
        return False
    try:
        return bool(_storage(incoming) or not incoming.numel())
    except RuntimeError:  # it has no storage at all
        return False


def number_of(denominator: Any) -> float:
    """The number that a mean shall be over; 0 where it is that, or only an operation can read it.

    So it is in graphs, where it is differentiated by, on another device, and as anything but a number.
    """
    if torch_state.is_compiling() or torch_state.transforms_active():
        return 0.0
    if isinstance(denominator, Tensor):
        learns = denominator.requires_grad or torch_state.forward_mode() or torch_state.is_tracing()
        if learns or not (denominator.is_cpu and is_plain(denominator)):
            return 0.0
        if denominator.dim() or denominator.is_complex():
            return 0.0
        denominator = denominator.item()
    return float(denominator) if type(denominator) in (int, float) else 0.0
