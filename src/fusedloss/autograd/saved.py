"""What backward finds of forward's tensors: as they were, changed meanwhile, or without memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import errors, plain, torch_state

Slot = Tensor | None


class Changed(NamedTuple):
    """In place of a saved tensor that was changed in place: what autograd says, and what it is now."""

    error: RuntimeError
    now: Tensor


def unpacked(ctx: Any) -> tuple[Any, ...]:
    """The saved tensors, with a `Changed` for each that autograd refuses to give."""
    try:
        return ctx.saved_tensors
    except RuntimeError:
        if not torch_state.unpacks_saved:
            raise
    return tuple(map(_unpack, ctx._raw_saved_tensors))  # raises where the graph was freed


def _unpack(saved: Any) -> Tensor | Changed | None:
    try:
        return saved.unpack()
    except RuntimeError as error:
        return Changed(error, saved.data.detach())


def unchanged(tensors: Sequence[Any]) -> Sequence[Slot]:
    """The tensors, none of which autograd refuses to give."""
    for tensor in tensors:
        if type(tensor) is Changed:
            raise tensor.error
    return tensors


@dataclass(slots=True)
class Saved:
    """What backward finds."""

    node: Any  # that bears the name of the loss
    call: Any
    tensors: Sequence[Any]  # with a `Changed` for those that are no longer what they were
    needed: Sequence[bool]
    stored: Sequence[Any] | None  # the gradients that forward computed, and more
    shape: torch.Size  # of the loss
    shapes: Sequence[torch.Size | None]  # of the tensors in forward
    device: int  # where they were
    own: bool  # the memory of what is stored is that of forward, and nobody else's

    @property
    def loss(self) -> str:
        name: str = self.node.name()
        return name.removeprefix("fusedloss::").removesuffix("Backward")

    def intact(self) -> bool:
        """Whether a kernel can read the tensors, and they are like those of forward."""
        for tensor, shape in zip(self.tensors, self.shapes, strict=True):
            if tensor is None:
                continue
            if type(tensor) is Changed or plain.gap(tensor):
                return False
            if tensor.shape != shape or tensor.get_device() != self.device:
                return False
        return True

    def settled(self, create_graph: bool) -> list[Slot]:
        """The tensors, if they are still what forward was given, or none of it matters.

        Raises:
            RuntimeError: a tensor was changed in place, has another shape or device, or no memory; or it was
                not kept.
        """
        found: list[Slot] = []
        names = self.call.arguments
        for k, (name, tensor, shape) in enumerate(
            zip(names, self.tensors, self.shapes, strict=True)
        ):
            if type(tensor) is Changed:
                if create_graph or self.call.reads(k, self.needed):
                    self.refuse(name, tensor)
                tensor = tensor.now
            if tensor is None and shape is not None:
                words = f"{name} is of inference mode, and not kept: create_graph=True needs a clone() of it"
                errors.fail(RuntimeError, self.loss, words)
            if tensor is not None and (tensor.shape != shape or tensor.get_device() != self.device):
                got = f"{list(tensor.shape)} on {tensor.device}"
                was = f"as {list(shape or ())}, and came back as {got}"
                errors.fail(RuntimeError, self.loss, f"{name} was saved for backward {was}")
            found.append(tensor)
        plain.check(self.loss, **dict(zip(names, found, strict=True)))
        return found

    def refuse(self, name: str, changed: Changed) -> NoReturn:
        if self.stored is None:
            half = "" if self.call.reduction == "none" else " in float16"
            why = (
                f"With reduction={self.call.reduction!r}{half} the inputs are kept, and no gradient is: "
                f"change a clone() of {name}, or change it after backward()"
            )
        else:
            why = (
                "The gradient was kept, but with create_graph=True it is computed anew, from what "
                f"{name} was: change a clone() of it"
            )
        message = f"{self.loss}: {name} was changed after the loss was taken: {changed.error} {why}"
        raise RuntimeError(message) from changed.error
