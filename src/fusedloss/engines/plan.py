"""What a call is given and gives, alike on every device: shapes, and memory for losses and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import reduce
from ..kinds import CtcCall, DiceCall, MarginCall, PointwiseCall, ReductionCall, RowsCall

Slot = Tensor | None
Slots = Sequence[Slot]


class Plan:
    """A call with its tensors as a kernel takes them, and the memory that it writes to."""

    incoming: Slot = None
    losses: Slot = None  # if they are not reduced
    total: Slot = None  # if they are
    stored: bool = (
        False  # whether `grads` hold the gradients for 1, to be made those for `incoming`
    )
    rest: Slots = ()  # what forward gave beside those
    shape: torch.Size = torch.Size()  # that the tensors broadcast to

    def __init__(self, call: Any, tensors: Slots, needed: Sequence[bool]) -> None:
        self.call, self.tensors = call, tensors
        self.spread()
        self.grads: list[Slot] = [None] * call.gradients  # None for those that are not needed
        if needed:
            for k, need in enumerate(needed[: call.gradients]):
                if need and (tensor := tensors[k]) is not None:
                    self.grads[k] = self.gradient(tensor)

    def spread(self) -> None:
        """Finds the shape, and lays out the tensors."""
        raise NotImplementedError

    def read(self) -> Slots:
        """The tensors as the kernel reads them."""
        return self.tensors

    def gradient(self, tensor: Tensor) -> Tensor:
        """Memory for the gradient by a tensor."""
        found: Tensor = self.call.empty_gradient(tensor)
        return found

    def unreduced(self) -> Tensor:
        """Memory for the losses."""
        raise NotImplementedError

    def result(self) -> Tensor:
        """Memory for what the call gives."""
        if self.call.reduction == "none":
            self.losses = found = self.unreduced()
        else:
            self.total = found = self.tensors[0].new_empty((), dtype=self.call.dtype)  # type: ignore[union-attr]
        return found

    def arrives(self, incoming: Tensor) -> None:
        """Lays out the gradient that arrives, of the shape of the result."""
        self.incoming = incoming


class PointwisePlan(Plan):
    call: PointwiseCall
    dense: bool  # whether every tensor has the shape and is contiguous

    def spread(self) -> None:
        tensors = self.tensors
        first = tensors[0]
        assert first is not None
        shape, dense = first.shape, first.is_contiguous()
        for t in tensors[1:]:
            if t is not None:
                if t.shape != shape:
                    shape, dense = common_shape(self.tensors), False
                    break
                dense = dense and t.is_contiguous()
        self.shape, self.dense = shape, dense

    def gradient(self, tensor: Tensor) -> Tensor:
        if self.dense:
            return torch.empty_like(tensor)
        return empty_like(tensor, self.shape, tensor.dtype)

    def unreduced(self) -> Tensor:
        first: Any = self.tensors[0]
        if self.dense:
            return torch.empty_like(first, dtype=self.call.dtype)
        return empty_like(first, self.shape, self.call.dtype)

    def arrives(self, incoming: Tensor) -> None:
        if self.dense and self.call.reduction == "none":
            self.incoming, self.dense = incoming, incoming.is_contiguous()
        else:
            self.incoming, self.dense = incoming.expand(self.shape), False


class RowsPlan(Plan):
    """Tensors are (n, c, d): an input of shape (N, C) is (1, C, N), so that positions have one stride, and

    (N, C, d1, ...) is (N, C, d1 * ...).
    """

    call: RowsCall
    x: Tensor
    target: Tensor
    weight: Slot  # of the type computed in

    def spread(self) -> None:
        input, target, weight = self.tensors
        assert input is not None and target is not None
        self.weight = of_kernel(weight, self.compute())
        self.x = flat(input, 2)
        self.target = flat(target, 2 if self.call.probabilities else 1)

    def compute(self) -> torch.dtype:
        """The type to compute in."""
        input, target, _ = self.tensors
        assert input is not None and target is not None
        return reduce.wide(input, target) if self.call.probabilities else reduce.wide(input)

    def sizes(self) -> Sequence[int]:
        s = self.x.shape
        return s if len(s) == 3 else (1, s[1], s[0]) if len(s) == 2 else (1, *s, 1)

    def read(self) -> Slots:
        return self.x, self.target, self.weight

    def unreduced(self) -> Tensor:
        input, target, _ = self.tensors
        assert input is not None and target is not None
        return input.new_empty(self.call.shape(input, target), dtype=self.call.dtype)

    def arrives(self, incoming: Tensor) -> None:
        self.incoming = flat(incoming, 1)


class DicePlan(Plan):
    """Tensors are (n, c, d), or (n, d): those of (N, C) have one position."""

    call: DiceCall
    x: Tensor
    target: Tensor
    weight: Slot  # of the type computed in

    def spread(self) -> None:
        input, target, weight = self.tensors
        assert input is not None and target is not None
        self.weight = of_kernel(weight, reduce.wide(input))
        self.x = self.of_images(input)
        if self.call.masks:
            self.target = self.of_images(target)
        else:
            self.target = target.unsqueeze(1) if target.dim() == 1 else flat(target, 1)

    @staticmethod
    def of_images(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(2) if tensor.dim() == 2 else flat(tensor, 2)

    def read(self) -> Slots:
        return self.x, self.target, self.weight

    def unreduced(self) -> Tensor:
        return self.x.new_empty(self.call.shape(self.x), dtype=self.call.dtype)


class ReductionPlan(Plan):
    """Operands are rows of features; a label is a column."""

    call: ReductionCall
    rows: int
    features: int
    flat: list[Tensor]

    def spread(self) -> None:
        operands, label = self.call.split(self.tensors)
        shape = self.shape = common_shape(operands)
        rows, features = self.rows, self.features = shape[:-1].numel(), shape[-1]
        given = operands
        if any(t.shape != shape for t in given):
            given = [t.expand(shape) for t in given]
        self.flat = list(given if len(shape) == 2 else (t.reshape(rows, features) for t in given))
        if label is not None:
            self.flat.append(label.expand(shape[:-1]).reshape(rows, 1))

    def read(self) -> Slots:
        return self.flat

    def gradient(self, tensor: Tensor) -> Tensor:
        return tensor.new_empty(self.shape)

    def unreduced(self) -> Tensor:
        return self.flat[0].new_empty(self.shape[:-1], dtype=self.call.dtype)

    def arrives(self, incoming: Tensor) -> None:
        self.incoming = incoming.expand(self.shape[:-1]).reshape(self.rows)


class CtcPlan(Plan):
    """The input is (t, n, c); the lengths are on the host."""

    call: CtcCall
    x: Tensor
    targets: Tensor
    # Of sequences and of their labels; where these begin, in memory and by position.
    lengths: Tensor
    label_stride: int
    most: int  # labels of a sequence

    def spread(self) -> None:
        log_probs, targets, *_ = self.tensors
        assert log_probs is not None and targets is not None
        self.x, self.targets = self.batch(log_probs), targets
        inputs, counts, starts = self.call.lengths(self.tensors)
        *across, self.label_stride = targets.stride()
        begins = [start * self.label_stride for start in starts]
        if across:
            begins = [n * across[0] for n in range(len(counts))]
        self.lengths = torch.tensor([inputs, counts, begins, starts], device="cpu")
        self.most = max(counts, default=0)

    @staticmethod
    def batch(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() == 3 else tensor.unsqueeze(1)

    def unreduced(self) -> Tensor:
        return self.x.new_empty(self.call.shape(*self.tensors), dtype=self.call.dtype)  # type: ignore[arg-type]


class MarginPlan(Plan):
    """The input is rows of classes; the target rows of labels."""

    call: MarginCall
    x: Tensor
    target: Tensor
    weight: Slot  # of the type computed in

    def spread(self) -> None:
        input, target, weight = self.tensors
        assert input is not None and target is not None
        self.shape = self.call.shape(input, target)
        self.x = input.reshape(self.shape.numel(), -1) if input.numel() else input
        self.target = target.reshape(len(self.x), -1) if target.numel() else target.unsqueeze(-1)
        self.weight = of_kernel(weight, reduce.wide(input))

    def read(self) -> Slots:
        return self.x, self.target, self.weight

    def unreduced(self) -> Tensor:
        return self.x.new_empty(self.shape, dtype=self.call.dtype)

    def arrives(self, incoming: Tensor) -> None:
        self.incoming = incoming.expand(self.shape).reshape(len(self.x))


def of_kernel(weight: Slot, compute: torch.dtype) -> Slot:
    """A class weight as kernels read it."""
    return None if weight is None else weight.to(compute).contiguous()


def common_shape(tensors: Slots) -> torch.Size:
    """That they broadcast to."""
    shapes = [t.shape for t in tensors if t is not None]
    first = shapes[0]
    for shape in shapes:
        if shape != first:
            return torch.broadcast_shapes(*shapes)
    return first


def empty_like(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """With the tensor's strides where it has the shape."""
    if tensor.shape == shape:
        return torch.empty_like(tensor, dtype=dtype)
    return tensor.new_empty(shape, dtype=dtype)


def flat(tensor: Tensor, first: int) -> Tensor:
    """Dimensions from `first` on as one: a view where it can be, else a copy."""
    return tensor.flatten(first) if tensor.dim() > first + 1 else tensor


def class_strides(tensor: Tensor) -> Sequence[int]:
    """(n, c, d) of a tensor with a class dimension, which is `flat` from 2."""
    s = tensor.stride()
    return s if len(s) == 3 else (0, s[1], s[0]) if len(s) == 2 else (0, *s, 0)


def value_strides(tensor: Tensor) -> Sequence[int]:
    """The same of a tensor with one value a row, or one for all of them."""
    s = tensor.stride()
    return (s[0], 0, s[1]) if len(s) == 2 else (0, 0, *s) if s else (0, 0, 0)
