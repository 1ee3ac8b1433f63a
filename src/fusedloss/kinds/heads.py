"""A loss over a linear head with all its settings, and its formula: logits in full, by torch operations.

The tensors that travel beside a call, N rows of D features, C classes and K heads of them:
input (N, D), linear_weight (C, K, D), linear_bias (C, K), target (N, K) or (N, C, K), weight (C),
sample_weight (N, K), denominator (); all but the first, the second and the target may be None. Where the call
has a shard, linear_weight, linear_bias and probabilities hold this process's classes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812

from ..core import reduce, torch_state
from ..core.indices import check_range
from ..core.shards import ClassShard
from .call import CLASSES, WHOLE, Axes, Kind
from .names import HEAD_SUMS
from .rows import RowsCall

Slot = Tensor | None
Slots = tuple[Slot, ...]


class Rows(NamedTuple):
    """What is known of each row, (N, K); the last three only where statistics are asked for."""

    loss: Tensor
    lse: Slot = None
    entropy: Slot = None
    correct: Slot = None  # 1 where no class is above the target's

    def each(self, f: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(f(self.loss), *(None if t is None else f(t) for t in self[1:]))


@dataclass(slots=True, repr=False, eq=False)
class LinearCall(Kind):
    loss: str
    probabilities: bool
    reduction: str
    ignore_index: int
    smoothing: float
    z_loss: float
    softcap: float  # 0: none
    logit_scale: float
    statistics: bool
    memory_budget: int  # 0: the default
    chunk_rows: int  # the most rows a chunk; 0: as many as the budget holds
    exact_logits: bool  # where the products round them: of all rows, or where that counts
    dtype: torch.dtype  # of the result
    shard: ClassShard | None = field(default=None, kw_only=True)

    family: ClassVar[str] = "linear"
    indices: ClassVar[tuple[int, ...]] = (3,)
    hides: ClassVar[bool] = True
    mixes: ClassVar[bool] = False  # a plain tensor beside a sharded weight may be a shard
    everywhere: ClassVar[bool] = True
    logits: ClassVar[int] = 1  # of each row and class, in a chunk
    sums: ClassVar[int] = HEAD_SUMS
    gradients: ClassVar[int] = 4  # by the first four tensors, unless the target is of indices

    learned: ClassVar[tuple[str, ...]] = ("softcap", "logit_scale")  # what may be a tensor
    of_rows: ClassVar[tuple[int, ...]] = (0,)  # which tensors the logits of a row are made of
    arguments: ClassVar[tuple[str, ...]] = (
        "input",
        "linear_weight",
        "linear_bias",
        "target",
        "weight",
        "sample_weight",
        "denominator",
    )

    @property
    def outputs(self) -> int:
        return 4 if self.statistics else 1

    def shape(self, input: Tensor, linear_weight: Tensor, *_: Slot) -> tuple[int, int]:
        """Of the unreduced results."""
        return input.shape[0], linear_weight.shape[1]

    def empty_gradients(self, tensors: Sequence[Slot], needed: Sequence[bool]) -> list[Tensor]:
        """Laid out as the loop over chunks lays out those that are needed."""
        kept = torch.contiguous_format
        return [
            torch.empty_like(t, dtype=t.dtype if k == 3 else reduce.wide(t), memory_format=kept)
            for k, (t, need) in enumerate(zip(tensors, needed, strict=False))
            if need and t is not None
        ]

    def empty_sums(self, tensors: Sequence[Slot]) -> Tensor:
        """For what all processes gather of each row, (N, K, `sums`)."""
        input, linear_weight = tensors[:2]
        assert input is not None and linear_weight is not None
        shape = (input.shape[0], linear_weight.shape[1], self.sums)
        return input.new_zeros(shape, dtype=reduce.exact(input))

    def axes(self, tensors: Sequence[Slot]) -> list[Axes]:
        of_target: Axes = (0, CLASSES, WHOLE) if self.probabilities else (0, WHOLE)
        of_head: Axes = (CLASSES, WHOLE, WHOLE)
        return [(0, WHOLE), of_head, of_head[:2], of_target, (CLASSES,), (0, WHOLE), ()]

    def losses(self, tensors: Sequence[Slot]) -> float | None:
        return float(math.prod(self.shape(*tensors))) if tensors[6] is None else None  # type: ignore[arg-type]

    def counter(self, tensors: Sequence[Slot]) -> int | None:
        return None if self.probabilities or tensors[3] is None or tensors[6] is not None else 3

    def count(self, tensors: Sequence[Slot]) -> Tensor:
        return self.divisor(tuple(tensors))

    def part(self, tensors: Slots, denominator: float | None) -> tuple[LinearCall, Slots]:
        call = replace(self, dtype=torch.float64)
        if denominator is None:
            return call, tensors
        divisor = torch.full((), denominator, dtype=torch.float64)
        return call, (*tensors[:6], divisor, *tensors[7:])

    def divided(self) -> tuple[int, ...]:
        return 1, 2, 3

    def replicated(self, tensors: Sequence[Slot]) -> tuple[int, int]:
        """Class indices and weights, but no teacher's tensors."""
        return 3, 7

    def refuses(self, tensors: Sequence[Slot]) -> bool:
        return not (self.probabilities or tensors[3] is None)

    def check(self, tensors: Sequence[Slot], given: Slot = None) -> None:
        """IndexError for a class index out of range; `given` is the target as the caller shaped it."""
        _, linear_weight, _, target, *_ = tensors
        if target is None or self.probabilities:
            return
        assert linear_weight is not None
        if given is None:
            given = target.squeeze(1) if target.shape[1] == 1 else target
        check_range(self.loss, given, self.classes(linear_weight), self.ignore_index)

    def classes(self, linear_weight: Tensor) -> int:
        """In all, those of other processes too."""
        return linear_weight.shape[0] if self.shard is None else self.shard.classes

    @property
    def learns(self) -> bool:
        """Whether a setting is a tensor that is differentiated by: the formula serves it."""
        return any(isinstance(getattr(self, name), Tensor) for name in self.learned)

    def by_formula(self, *tensors: Slot) -> tuple[Tensor, ...]:
        input, linear_weight, linear_bias, target, weight, *_ = self.masked(tensors)
        assert input is not None and linear_weight is not None and target is not None
        x = self.logits_of(input, linear_weight, linear_bias)
        if self.shard is not None and self.probabilities:
            target = self.shard.whole(target, 1)
        return self.results(self.rows(x.to(reduce.wide(x)), target, weight), tensors)

    def logits_of(self, input: Tensor, linear_weight: Tensor, linear_bias: Slot) -> Tensor:
        """Of all classes, (N, C, K)."""
        if self.shard is not None and self.shard.adds:
            input = self.shard.spread(input)
        bias = None if linear_bias is None else linear_bias.flatten()
        x = F.linear(input, linear_weight.flatten(0, 1), bias)
        x = x.reshape(input.shape[0], *linear_weight.shape[:2])
        return x if self.shard is None else self.shard.whole(x, 1)

    def rows(self, x: Tensor, target: Tensor, weight: Slot) -> Rows:
        """From the logits (N, C, K), in the type to compute in."""
        x = capped(scaled(x, self.logit_scale), self.softcap)
        rows = RowsCall(
            "cross_entropy", self.probabilities, "none", self.ignore_index, self.smoothing, x.dtype
        )
        losses = rows.by_formula(x, target, weight)
        if not (self.z_loss or self.statistics):
            return Rows(losses)
        counted = self.counted(target)
        if counted is not None:
            x = torch.where(counted.unsqueeze(1), x, 0)
        lse = x.logsumexp(1)
        if self.z_loss:
            losses = losses + self.z_loss * _where(counted, lse.square())
        if not self.statistics:
            return Rows(losses)
        entropy = lse - (x.softmax(1) * x).sum(1)
        index = target.to(torch.int64).clamp(0, x.shape[1] - 1).unsqueeze(1)
        correct = (x.gather(1, index).squeeze(1) == x.amax(1)).to(x.dtype)
        return Rows(losses, *(_where(counted, t) for t in (lse, entropy, correct)))

    def counted(self, target: Slot) -> Slot:
        """Which rows are not ignored; None where all count."""
        if self.probabilities or target is None:
            return None
        # A smaller type would wrap `ignore_index` around, into a class.
        return target.to(torch.int64) != self.ignore_index

    def masked(self, tensors: Slots) -> Slots:
        """With 0 for what rows hold that do not count: as 0 * inf it would make a gradient NaN."""
        target, sample_weight = tensors[3], tensors[5]
        kept = self.counted(target)
        if sample_weight is not None and not _is_differentiated(sample_weight):
            weighed = sample_weight != 0
            kept = weighed if kept is None else kept & weighed
        if kept is None:
            return tensors
        some, own = kept.any(1).unsqueeze(1), list(tensors)
        for k in self.of_rows:
            own[k] = None if (held := own[k]) is None else torch.where(some, held, 0)
        if self.probabilities and target is not None:
            own[3] = torch.where(kept.unsqueeze(1), target, 0)
        return tuple(own)

    def scale(self, tensors: Slots, incoming: Slot = None) -> Slot:
        """What each row's loss counts in the result, (N, K) or (); None where that is 1."""
        scale: Slot = None
        for factor in (incoming, tensors[5]):
            if factor is not None:
                factor = factor.to(reduce.exact(factor))
                scale = factor if scale is None else scale * factor
        if self.reduction == "mean":
            return (1 if scale is None else scale) / self.divisor(tensors)
        return scale

    def divisor(self, tensors: Slots, add: Callable[..., Tensor] = torch.sum) -> Tensor:
        """What 'mean' divides by."""
        input, linear_weight, _, target, weight, _, denominator = tensors[:7]
        assert input is not None and linear_weight is not None
        if denominator is not None:
            return denominator.to(reduce.exact(denominator))
        exact, counted = reduce.exact(input), self.counted(target)
        if counted is None:
            rows = input.shape[0] * linear_weight.shape[1]
            return torch.full((), rows, dtype=exact, device=input.device)
        if weight is None or target is None:
            return counted.sum().to(exact)
        index = target.to(torch.int64).clamp(0, max(weight.shape[0] - 1, 0))
        return add(torch.where(counted, weight[index], 0), dtype=exact)

    def results(
        self, rows: Rows, tensors: Slots, add: Callable[..., Tensor] = torch.sum
    ) -> tuple[Tensor, ...]:
        """What the call returns: the loss, or with statistics those of each row."""
        if self.statistics:
            return tuple(t.to(self.dtype).contiguous() for t in rows if t is not None)
        sample_weight = tensors[5]
        losses = rows.loss if sample_weight is None else rows.loss * sample_weight
        if self.reduction == "none":
            return (losses.to(self.dtype).contiguous(),)
        total = add(losses)
        if self.reduction == "mean":
            total = total / self.divisor(tensors, add)
        return (total.to(self.dtype),)


class Ready(NamedTuple):
    """A checked call: what runs it gives `finish` the results, those of rows in a `shape`."""

    call: LinearCall
    tensors: Slots
    target: Slot  # as the caller shaped it
    shape: torch.Size | None
    finish: Callable[[Sequence[Tensor]], Any]

    def done(self, results: Sequence[Tensor]) -> Any:
        shape = self.shape
        return self.finish(results if shape is None else [t.reshape(shape) for t in results])


def of_one_head(tensors: Slots) -> Slots:
    """The tensors of a call, as it takes them, from what the caller of one head gave."""
    input, linear_weight, bias, target, weight, share, denominator, *teacher = tensors
    assert input is not None
    rows = (input.shape[:-1].numel(), -1)
    constant = (t if t is None else t.detach() for t in teacher)
    theirs = zip(constant, (False, True, True, False), strict=False)
    return (
        input.reshape(rows),
        _of_classes(linear_weight),
        _of_classes(bias),
        None if target is None else target.reshape(rows),
        weight,
        None if share is None else share.reshape(rows),
        denominator,
        *(_of_classes(t) if c else t if t is None else t.reshape(rows) for t, c in theirs),
    )


def _of_classes(tensor: Slot) -> Slot:
    return None if tensor is None else tensor.unsqueeze(1)


def scaled(x: Tensor, scale: Tensor | float) -> Tensor:
    return x * scale if isinstance(scale, Tensor) or scale != 1 else x


def capped(x: Tensor, softcap: Tensor | float) -> Tensor:
    if isinstance(softcap, Tensor) or softcap:
        return softcap * torch.tanh(x / softcap)
    return x


def _is_differentiated(tensor: Tensor) -> bool:
    """By autograd or a transform around, which wrap what is not differentiated, too; in doubt, it is."""
    if torch_state.is_compiling():
        return tensor.requires_grad
    if torch_state.forward_mode():
        return torch_state.is_wrapped(tensor) or forward_ad.unpack_dual(tensor).tangent is not None
    while not tensor.requires_grad and torch_state.is_wrapped(tensor):
        tensor = torch_state.unwrapped(tensor)
    return tensor.requires_grad


def _where(counted: Slot, values: Tensor) -> Tensor:
    return values if counted is None else torch.where(counted, values, 0)
