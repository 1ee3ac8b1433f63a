"""What a kernel can read: a plain tensor with memory of its own. The one place that says so.

Asked of every argument, of gradients that arrive in backward, and of what was saved for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import fail

PLAIN = (Tensor, torch.nn.Parameter)

_has_storage = torch._C._has_storage
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active


class Unreadable(Exception):
    """A kernel was handed a tensor without memory: a call like an earlier one is checked anew."""


def gap(tensor: Tensor) -> str | None:
    """Why no kernel reads the tensor, so that the formula serves it, or None."""
    if type(tensor) not in PLAIN:
        return f"{type(tensor).__name__} is a tensor subclass"
    if not (tensor.is_cpu or tensor.is_cuda):
        return f"there are no kernels for {tensor.device.type} tensors"
    if tensor.layout is not torch.strided:
        return f"the layout is {tensor.layout}"
    if tensor.is_neg() or tensor.is_conj():
        return "a tensor has a lazy sign"
    if tensor._is_zerotensor():
        return "a zero tensor has no memory"
    return None if _has_storage(tensor) else "a tensor has no memory"


def lacks_memory(tensor: Tensor) -> bool:
    """Whether the storage of a plain tensor ends before its elements do."""
    if (
        type(tensor) not in PLAIN
        or not (tensor.is_cpu or tensor.is_cuda)
        or tensor.layout is not torch.strided
        or not _has_storage(tensor)
        or tensor._is_zerotensor()
        or not tensor.numel()
    ):
        return False
    span = tensor.numel()
    if not tensor.is_contiguous():
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in pairs)
    needed = (tensor.storage_offset() + span) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed or not tensor.data_ptr()


class Like(NamedTuple):
    """What a tensor must be like where its memory is handled."""

    shape: torch.Size
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor | None) -> Like | None:
        return None if tensor is None else cls(tensor.shape, tensor.device)

    def fits(self, tensor: Tensor) -> bool:
        return tensor.shape == self.shape and tensor.device == self.device


def check(function: str, **tensors: Tensor | None) -> None:
    """Refuses a tensor whose storage was freed: PyTorch's operations would end the process.

    Raises:
        RuntimeError: there is one.
    """
    if torch.compiler.is_compiling() or _transforms_active() or torch._C._is_tracing():
        return
    for name, tensor in tensors.items():
        if tensor is not None and lacks_memory(tensor):
            held, numel = tensor.untyped_storage().nbytes(), tensor.numel()
            fail(
                RuntimeError,
                function,
                f"the storage of {name} was freed: {numel} elements of {tensor.dtype}, shape "
                f"{list(tensor.shape)}, are to be read from {held} bytes. untyped_storage().resize_() does "
                "so, and FSDP with it: gather the tensor first (unshard(), summon_full_params)",
            )


def is_plain(incoming: Tensor) -> bool:
    """Whether a kernel can read the gradient that arrives.

    A mapped or fake one has no memory, and neither has the zero that `sgn()` sends back.
    """
    if type(incoming) is not Tensor or _dispatch_modes() or incoming.is_neg():
        return False
    try:
        return bool(incoming.data_ptr() or not incoming.numel())
    except RuntimeError:  # it has no storage at all
        return False
