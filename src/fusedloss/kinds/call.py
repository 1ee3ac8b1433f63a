"""What every kind of call says of itself, and what most of them say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ..core import reduce

# Of each dimension of a tensor which one of the unreduced losses' it is, or one of these.
Axes = tuple[int | None, ...]
WHOLE, CLASSES = None, -1  # all of it counts in each loss; so do the classes


def aligned(shape: Sequence[int], whole: Sequence[int]) -> Axes:
    """Of a shape that broadcasts to a whole one."""
    first = len(whole) - len(shape)
    return tuple(first + k if size == whole[first + k] else WHOLE for k, size in enumerate(shape))


class Kind:
    __slots__ = ()

    reduction: str
    denominator: float | None
    indices: ClassVar[tuple[int, ...]] = ()  # the tensors that may hold class indices, or counts
    hides: ClassVar[bool] = False  # every dispatch mode: the formula takes much memory
    separable: ClassVar[bool] = True  # what arrives at a loss scales gradients of its own
    counts: ClassVar[bool] = False  # what its kernel is given depends on values of tensors
    of_nothing: ClassVar[float] = 0.0  # what scales gradients of a mean over nothing
    mixes: ClassVar[bool] = True  # with plain operands beside DTensors, where nothing is divided
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

    def axes(self, tensors: Sequence[Any]) -> list[Axes]:
        """Of each tensor what its dimensions are to the losses."""
        return [(WHOLE,) * (0 if t is None else t.dim()) for t in tensors]

    def divided(self) -> tuple[int, ...]:
        """The tensors whose classes may stay divided among processes; the first one says whether they are."""
        return ()

    def replicated(self, tensors: Sequence[Any]) -> tuple[int, int]:
        """From where to where plain tensors beside DTensors count as held alike by every process."""
        first: int = self.gradients  # type: ignore[attr-defined]
        return first, len(tensors)

    def over(self, count: int) -> float:
        """What the sum of so many losses is divided by."""
        if self.reduction != "mean":
            return 1.0
        return float(count) if self.denominator is None else self.denominator

    def losses(self, tensors: Sequence[Any]) -> float | None:
        """How many losses there are; None where the caller gave what 'mean' divides by."""
        if self.denominator is not None:
            return None
        return float(math.prod(self.shape(*tensors)))  # type: ignore[attr-defined]

    def counter(self, tensors: Sequence[Any]) -> int | None:
        """The tensor that says what 'mean' divides by, if shapes do not."""
        return None

    def count(self, tensors: Sequence[Any]) -> Tensor:
        """What 'mean' divides by, of the tensors of a shard."""
        raise NotImplementedError

    def part(
        self, tensors: tuple[Any, ...], denominator: float | None
    ) -> tuple[Any, tuple[Any, ...]]:
        """A shard's part in a reduced loss: in a mean, what it adds to one over `denominator`."""
        dtype = reduce.exact(tensors[0])
        if denominator is None:
            return replace(self, dtype=dtype), tensors  # type: ignore[type-var]
        return replace(self, dtype=dtype, denominator=denominator), tensors  # type: ignore[type-var]

    def refuses(self, tensors: Sequence[Any]) -> bool:
        """Whether its kernel refuses what some tensors may hold."""
        return bool(self.indices)

    def check(self, tensors: Sequence[Any]) -> None:
        """Refuses what the formula would not: class indices out of range."""
