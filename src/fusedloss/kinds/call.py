"""What every kind of call says of itself, and what most of them say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor


class Kind:
    __slots__ = ()

    reduction: str
    denominator: float | None
    indices: ClassVar[tuple[int, ...]] = ()  # the tensors that may hold class indices, or counts
    hides: ClassVar[bool] = False  # every dispatch mode: the formula takes much memory
    separable: ClassVar[bool] = True  # what arrives at a loss scales gradients of its own
    counts: ClassVar[bool] = False  # what its kernel is given depends on values of tensors
    everywhere: ClassVar[bool] = False  # torch operations serve as well on devices without kernels

    def compiles(self, tensors: Sequence[Any]) -> bool:
        """Whether a compiled graph holds the call as one operator of torch."""
        return True

    @property
    def gpu_gap(self) -> str | None:
        """What of this call the kernels of a GPU do not know, or None."""
        return None

    @property
    def cpu_gap(self) -> str | None:
        """The same of the CPU's, which were built before."""
        return None

    @property
    def outputs(self) -> int:
        """How many results there are."""
        return 1

    @property
    def stores_gradients(self) -> bool:
        """Whether forward computes the gradients, which backward then scales."""
        return self.reduction != "none"

    def reads(self, k: int, needed: Sequence[bool]) -> bool:
        """Whether the gradients that are needed depend on what tensor k holds."""
        return True

    def empty_gradient(self, tensor: Tensor) -> Tensor:
        """Laid out as the kernels lay out the gradient by this tensor."""
        return tensor.new_empty(tensor.shape)

    def replicated(self, tensors: Sequence[Any]) -> tuple[int, int]:
        """From where to where plain tensors beside DTensors count as held alike by every process."""
        first: int = self.gradients  # type: ignore[attr-defined]
        return first, len(tensors)

    def over(self, count: int) -> float:
        """What the sum of so many losses is divided by."""
        if self.reduction != "mean":
            return 1.0
        return float(count) if self.denominator is None else self.denominator

    def check(self, tensors: Sequence[Any]) -> None:
        """Refuses what the formula would not: class indices out of range."""
