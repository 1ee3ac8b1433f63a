"""Connectionist temporal classification with all its settings, and its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import errors, reduce
from ..core.indices import readable
from .alone import lowered
from .call import CLASSES, WHOLE, Axes, Kind

INF = float("inf")


class Lengths(NamedTuple):
    """Of a batch: of each sequence, of its labels, and which of all labels is its first."""

    inputs: list[int]
    targets: list[int]
    starts: list[int]


@dataclass(slots=True, repr=False, eq=False)
class CtcCall(Kind):
    """Tensors: log-probabilities (T, N, C) or (T, C), labels, and two of lengths in int64."""

    blank: int
    reduction: str
    zero_infinity: bool
    dtype: torch.dtype
    denominator: float | None = None  # what 'mean' divides by, in place of its own count

    family: ClassVar[str] = "ctc"
    loss: ClassVar[str] = "ctc_loss"
    name: ClassVar[str] = "ctc_loss"
    gradients: ClassVar[int] = 1
    indices: ClassVar[tuple[int, ...]] = (1, 2, 3)
    counts: ClassVar[bool] = True
    arguments: ClassVar[tuple[str, ...]] = (
        "log_probs",
        "targets",
        "input_lengths",
        "target_lengths",
    )

    def shape(self, log_probs: Tensor, *_: Tensor) -> torch.Size:
        """Of the unreduced losses."""
        return log_probs.shape[1:-1]

    def axes(self, tensors: Sequence[Any]) -> list[Axes]:
        log_probs, targets, *lengths = tensors
        if targets.dim() < 2 or log_probs.dim() < 3:
            # Where labels begin depends on those before.
            return Kind.axes(self, tensors)
        return [(WHOLE, 0, CLASSES), (0, WHOLE), *((0,) * t.dim() for t in lengths)]

    def empty_gradient(self, tensor: Tensor) -> Tensor:
        """Laid out as the kernels lay out the gradient by this tensor."""
        return torch.empty_like(tensor, requires_grad=False)

    def spread(self, incoming: Tensor) -> Tensor:
        return incoming.unsqueeze(-1)

    def check(self, tensors: Sequence[Any]) -> None:
        """Refuses lengths and labels out of range, where they can be read."""
        seen = [readable(t) for t in tensors[2:]]
        if any(t is None for t in seen):
            return
        lengths = self.lengths(tensors)
        if (targets := readable(tensors[1])) is None:
            return
        labels = targets.to(torch.int64).flatten()
        outside = (labels < 0) | (labels >= tensors[0].shape[-1])
        if outside.any():
            for start, count in zip(lengths.starts, lengths.targets, strict=True):
                if (bad := outside[start : start + count]).any():
                    at = start + int(bad.nonzero()[0])
                    refuse_label(targets.shape, at, int(labels[at]), tensors[0].shape[-1])

    def lengths(self, tensors: Sequence[Any]) -> Lengths:
        """Those of a call whose tensors can be read.

        Raises:
            RuntimeError: one is negative, or beyond the frames or the labels that there are.
        """
        log_probs, targets, *_ = tensors
        inputs, counts = (t.flatten().tolist() for t in tensors[2:])
        for name, found, most in (
            ("input_lengths", inputs, log_probs.shape[0]),
            ("target_lengths", counts, targets.shape[1] if targets.dim() == 2 else None),
        ):
            if min(found, default=0) < 0:
                _refuse_length(name, found, found.index(min(found)), "at least 0")
            if most is not None and max(found, default=0) > most:
                at = found.index(max(found))
                _refuse_length(name, found, at, f"at most {most}", targets.shape)
        if targets.dim() == 2:
            return Lengths(inputs, counts, [n * targets.shape[1] for n in range(len(counts))])
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        if (total := starts.pop()) != targets.shape[0]:
            errors.fail(
                RuntimeError,
                self.loss,
                f"targets {list(targets.shape)} must hold the labels of all sequences, as many as the sum "
                f"of target_lengths, {total}: Expected tensor to have size {total} at dimension 0, but got "
                f"size {targets.shape[0]} for argument #2 'targets'",
            )
        return Lengths(inputs, counts, starts)

    def by_formula(
        self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        alone = log_probs.dim() == 2
        x = (log_probs.unsqueeze(1) if alone else log_probs).to(reduce.exact(log_probs))
        inputs, counts = (t.to(x.device).reshape(-1) for t in (input_lengths, target_lengths))
        labels = _padded(targets, counts)
        place = torch.arange(labels.shape[1], device=x.device)
        inside = place < counts.unsqueeze(1)
        outside = inside & ((labels < 0) | (labels >= x.shape[2]))
        labels = torch.where(inside & ~outside, labels, self.blank)
        losses = -_log_likelihood(x, labels, inputs, counts, self.blank)
        # On the CPU labels were checked; elsewhere NaN says so.
        losses = torch.where(outside.any(1), float("nan"), losses)
        if self.zero_infinity:
            losses = torch.where(losses == INF, 0, losses)
        if self.reduction == "mean":
            losses = losses / counts.clamp(min=1)
        result = reduce.total(losses, self.reduction, self.denominator)
        return lowered(result, alone).to(self.dtype)


def refuse_label(shape: torch.Size, position: int, value: int, classes: int) -> NoReturn:
    """IndexError for the label at a linear position of the targets."""
    errors.fail(
        IndexError,
        CtcCall.loss,
        f"targets{errors.position(position, shape)} = {value} is out of range for {classes} classes: a label "
        f"that counts, among the first target_lengths of its sequence, is from 0 to {classes - 1}",
    )


def _refuse_length(
    name: str, found: list[int], at: int, rule: str, targets: torch.Size | None = None
) -> NoReturn:
    where = f" (targets {list(targets)})" if targets and name == "target_lengths" else ""
    errors.fail(
        RuntimeError,
        CtcCall.loss,
        f"{name}[{at}] must be {rule}{where}: Expected {name} to have value {rule}, but got value "
        f"{found[at]}",
    )


def _padded(targets: Tensor, counts: Tensor) -> Tensor:
    """Labels as (N, S), S the most of one sequence, or a number that is surely not below it."""
    targets = targets.to(torch.int64)
    if targets.dim() == 2:
        return targets
    seen = readable(counts)
    most = targets.shape[0] if seen is None else int(seen.max())
    place = torch.arange(most, device=targets.device)
    starts = counts.cumsum(0) - counts
    at = (starts.unsqueeze(1) + place).clamp(max=max(targets.shape[0] - 1, 0))
    return targets[at] if targets.shape[0] else at


def _log_likelihood(
    x: Tensor, labels: Tensor, inputs: Tensor, counts: Tensor, blank: int
) -> Tensor:
    """The logarithm of the sum over alignments, frame by frame, of (T, N, C).

    The state of a sequence is that of blanks 0 to S, then that of labels 0 to S, of which 0 is none.
    """
    frames, n, _ = x.shape
    none = x.new_full((n, 1), -INF)
    index = torch.cat([torch.full_like(counts, blank).unsqueeze(1), labels], 1)
    of_labels = x.gather(2, index.expand(frames, *index.shape))
    of_blanks = x[:, :, blank].unsqueeze(2).expand_as(of_labels)
    steps = torch.cat([of_blanks, of_labels], 2)
    size = index.shape[1]
    # A label follows another of its kind over a blank alone.
    follows = torch.cat([labels.new_zeros(n, 2) > 0, labels[:, 1:] != labels[:, :-1]], 1)[:, :size]
    state = torch.cat([torch.zeros_like(none), none.expand(n, 2 * size - 1)], 1)
    for t in range(frames):
        blanks, own = state[:, :size], state[:, size:]
        second = torch.cat([own, none, blanks[:, :-1]], 1)
        third = torch.where(follows, torch.cat([none, own[:, :-1]], 1), -INF)
        third = torch.cat([none.expand(n, size), third], 1)
        new = steps[t] + _log_sum(torch.stack([state, second, third]))
        state = torch.where((t < inputs).unsqueeze(1), new, state)
    last = torch.stack([counts, counts + size], 1)
    return _log_sum(state.gather(1, last).t())


def _log_sum(x: Tensor) -> Tensor:
    """log(sum(exp(x))) along the first dimension: of no probability -inf, whose derivatives are 0."""
    top, place = x.detach().max(0)
    dead = top == -INF
    own = torch.arange(x.shape[0], device=x.device).reshape(-1, *(1,) * (x.dim() - 1)) == place
    # Less the 1 of the greatest, so that log1p keeps the digits of what lies beside it.
    rest = ((x - torch.where(dead, 0, top)).exp() - own.to(x.dtype)).sum(0)
    return torch.where(dead, -INF, top + torch.where(dead, 0, rest).log1p())
