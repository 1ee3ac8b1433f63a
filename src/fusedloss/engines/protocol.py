"""What runs the calls of one kind on one kind of device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from ..kinds import Call
from .plan import Plan, Slot, Slots

P = TypeVar("P", bound=Plan)


class Engine(ABC, Generic[P]):
    """A kind of call has its plan; what is left to an engine is to launch that."""

    plan: type[P]

    def forward(
        self, call: Call, tensors: Slots, needed: Sequence[bool]
    ) -> tuple[Tensor, list[Slot]]:
        """The result, and the gradients that are needed, in the shape that all broadcast to.

        After these a GPU's engine may give more, which its `rescale` takes beside them.
        """
        plan = self.plan(call, tensors, needed)
        result = plan.result()
        self.launch(plan)
        return result, plan.grads

    def backward(
        self, call: Call, tensors: Slots, needed: Sequence[bool], incoming: Tensor
    ) -> list[Slot]:
        """The gradients that are needed, for the one that arrives."""
        plan = self.plan(call, tensors, needed)
        plan.arrives(incoming)
        self.launch(plan)
        return plan.grads

    def rescale(self, call: Call, tensors: Slots, stored: Slots, incoming: Tensor) -> None:
        """Makes gradients that a forward stored those for `incoming`: does nothing where that is 1."""
        plan = self.plan(call, tensors, ())
        plan.grads, plan.rest = list(stored[: call.gradients]), stored[call.gradients :]
        plan.arrives(incoming)
        plan.stored = True
        self.launch(plan)

    @abstractmethod
    def launch(self, plan: P) -> None:
        """Runs the kernels."""

    @abstractmethod
    def prepare(
        self, call: Call, tensors: tuple[Slot, ...], needed: Sequence[bool], stores: bool
    ) -> Any:
        """How to repeat this call, an `Again`, if that can be, or None."""
