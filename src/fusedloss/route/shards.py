"""DTensors: each process runs the kernel on the shards that it holds, and one gather makes the loss of all.

What is sharded along the losses stays so; all else comes whole to every process. A reduced loss is held alike
by all of them, and so is an error: the processes tell each other of it before any raises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import errors, plain, sharded, torch_state
from ..core.shards import ClassShard
from ..kinds.call import CLASSES
from ..kinds.torch_m import OutsideDomain

Slot = Tensor | None
Rows = list[list[float]]  # of each process its numbers, and what became of it
Compute = Callable[[Any, tuple[Any, ...], ClassShard | None], Sequence[Tensor]]

FINE, RAISED, OUTSIDE = 0.0, 1.0, 2.0  # what became of a process


class Split(NamedTuple):
    """How a dimension of the mesh divides the losses: along an axis of theirs, as a placement says."""

    axis: int
    placement: Any

    def of(self, dim: int) -> Any:
        """The same of a tensor's dimension."""
        from torch.distributed.tensor import Shard

        if self.placement.dim == dim:
            return self.placement
        factor = self.interleaved
        return Shard(dim) if factor is None else type(self.placement)(dim, split_factor=factor)

    @property
    def interleaved(self) -> int | None:
        """In how many pieces a process has its rows, which were a sequence's; None: in one."""
        return getattr(self.placement, "split_factor", None)


class Classes(NamedTuple):
    """How a dimension of the mesh divides the classes."""

    dim: int  # of the mesh
    shard: ClassShard
    divided: tuple[int, ...]  # the tensors of which a process has its classes alone

    def places(self, k: int, axes: Sequence[int | None], whole: Any, partial: Any) -> Any:
        """Of tensor k and of its gradient; of what logits are made of each process has a part of that."""
        if k in self.divided and CLASSES in axes:
            from torch.distributed.tensor import Shard

            return (Shard(axes.index(CLASSES)),) * 2
        return whole, whole if k else partial


@dataclass
class Layout:
    mesh: Any
    splits: list[Split | None]  # by dimension of the mesh
    classes: Classes | None
    whole: Any  # the placement of what every process holds alike
    partial: Any  # and of what is to be added up

    def local(self, tensor: Slot, axes: Sequence[int | None], k: int) -> Slot:
        """What this process holds of tensor k; its gradient comes back placed as the tensor is."""
        if tensor is None:
            return None
        wanted, grads = self.places(axes, k)
        if not sharded.is_sharded(tensor):
            if wanted == self.everywhere and not (tensor.requires_grad and grads != wanted):
                return tensor
            tensor = sharded.placed(tensor, self.mesh, self.everywhere)
        placed: Any = tensor
        if list(placed.placements) != wanted or (placed.requires_grad and grads != wanted):
            placed = placed.redistribute(self.mesh, wanted)
        found: Tensor = plain.taken(placed.to_local(grad_placements=grads))
        return found

    def places(self, axes: Sequence[int | None], k: int) -> tuple[list[Any], list[Any]]:
        """Where tensor k is wanted, and its gradient."""
        wanted = self.placements(axes, self.whole)
        grads = self.placements(axes, self.partial)
        if (by := self.classes) is not None:
            wanted[by.dim], grads[by.dim] = by.places(k, axes, self.whole, self.partial)
        return wanted, grads

    def placements(self, axes: Sequence[int | None], otherwise: Any) -> list[Any]:
        """Of a tensor with these axes; `otherwise` where the losses are split along another."""
        return [
            self.whole
            if split is None
            else split.of(axes.index(split.axis))
            if split.axis in axes
            else otherwise
            for split in self.splits
        ]

    @property
    def everywhere(self) -> list[Any]:
        return [self.whole] * len(self.splits)

    def gathered(self, mine: Tensor) -> Tensor:
        """What each process that has another part says, in rows in the order of the processes."""
        rows = mine.unsqueeze(0)
        for group in self.groups:
            rows = gathered(rows, group)
        return rows

    @property
    def groups(self) -> list[Any]:
        """Those of processes that have other losses."""
        return [self.mesh.get_group(k) for k, split in enumerate(self.splits) if split is not None]


def gathered(rows: Tensor, group: Any) -> Tensor:
    """Those of all processes of a group, in their order."""
    found = rows.new_empty(group.size() * len(rows), rows.shape[1])
    torch.distributed.all_gather_into_tensor(found, rows, group=group)
    return found


def layout(loss: str, call: Any, tensors: Sequence[Any]) -> Layout:
    """Where the losses may stay divided: as the first tensor is that is divided along them.

    Raises:
        RuntimeError: the tensors are on meshes that differ.
    """
    from torch.distributed.tensor import Partial, Replicate

    axes, names = call.axes(tensors), call.arguments
    placed = [k for k, t in enumerate(tensors) if t is not None and sharded.is_sharded(t)]
    mesh = tensors[placed[0]].device_mesh
    for k in placed:
        if tensors[k].device_mesh != mesh:
            errors.fail(
                RuntimeError,
                loss,
                f"{names[k]} is a DTensor on {tensors[k].device_mesh}, {names[placed[0]]} on {mesh}: the "
                "tensors of a loss are on one mesh. Make it of the local tensors: "
                f"DTensor.from_local({names[k]}.full_tensor(), {names[placed[0]]}.device_mesh)",
            )
    splits = [
        _split([(axes[k], tensors[k].placements[m]) for k in placed]) for m in range(mesh.ndim)
    ]
    classes = _classes(mesh, tensors, axes, call.divided())
    if classes is not None:
        splits[classes.dim] = None
    first, last = call.replicated(tensors)
    for k, t in enumerate(tensors):
        if not (t is None or k in placed or first <= k < last) and (any(splits) or not call.mixes):
            _refuse_plain(loss, names[k], names[placed[0]], tensors[placed[0]])
    counter = call.counter(tensors) if call.reduction == "mean" else None
    if counter is not None and any(s and s.axis not in axes[counter] for s in splits):
        splits = [None] * mesh.ndim  # what counts is not divided as the losses are
    return Layout(mesh, splits, classes, Replicate(), Partial())


def _classes(
    mesh: Any, tensors: Sequence[Any], axes: Sequence[Any], divided: tuple[int, ...]
) -> Classes | None:
    """The first dimension of the mesh that divides the classes of the tensor that tells."""
    from torch.distributed.tensor import Shard

    if not divided or not sharded.is_sharded(tensors[divided[0]]):
        return None
    tensor, axis = tensors[divided[0]], axes[divided[0]].index(CLASSES)
    for m, placement in enumerate(tensor.placements):
        if type(placement) is Shard and placement.dim == axis:
            ranks, size = mesh.size(m), tensor.shape[axis]
            most = -(-size // ranks)
            sizes = tuple(max(0, min(most, size - k * most)) for k in range(ranks))
            shard = ClassShard(mesh.get_group(m), mesh.get_local_rank(m), sizes, adds=False)
            return Classes(m, shard, divided)
    return None


def _split(tensors: Sequence[tuple[Sequence[int | None], Any]]) -> Split | None:
    """Of the axes of tensors and their placements along one dimension of the mesh."""
    found: list[Split] = []
    for axes, placement in tensors:
        dim = getattr(placement, "dim", None)
        axis = None if dim is None else axes[dim]
        if axis is not None and axis >= 0:
            found.append(Split(axis, placement))
    # Rows of sequences are interleaved: they stay where all tensors agree on it.
    alike = all(s.interleaved == found[0].interleaved for s in found)
    return found[0] if found and alike else None


def _refuse_plain(loss: str, name: str, placed: str, like: Any) -> NoReturn:
    errors.fail(
        RuntimeError,
        loss,
        f"{name} is a plain tensor beside the DTensor {placed} on {list(like.placements)}: got mixed "
        f"torch.Tensor and DTensor. What every process holds in full becomes one by distribute_tensor({name}, "
        f"{placed}.device_mesh, {placed}.placements), a shard by DTensor.from_local()",
    )


class Divisor(NamedTuple):
    """What a mean divides by. A shard's kernel divides by a guess, which is right where every row counts."""

    guess: float | None  # None: by nothing, or by what the caller gave
    known: float = 1.0
    counted: Slot = None  # of this shard, where it depends on what tensors hold

    @classmethod
    def of(cls, call: Any, tensors: Sequence[Any], shards: Sequence[Any]) -> Divisor:
        known = call.losses(tensors) if call.reduction == "mean" else None
        if known is None:
            return cls(None)
        counted = None if call.counter(tensors) is None else call.count(shards)
        return cls(known if known > 0 else 1.0, known, counted)

    def of_numbers(self, rows: Rows) -> tuple[float, float]:
        """The result, and its scale, as `totals` and `scale` find them; 1 for None."""
        total, count = rows[0][0], rows[0][1]
        for row in rows[1:]:
            total, count = total + row[0], count + row[1]
        if self.guess is None or (self.counted is None and self.guess == self.known):
            return total, 1.0
        if self.counted is None:
            count = self.known
        scale = self.guess / count if count else math.copysign(math.inf, count)
        return total * scale, scale

    def scale(self, sums: Tensor) -> Slot:
        """What makes the mean of what was divided by the guess; None for 1. `sums` hold the count of all."""
        if self.guess is None or (self.counted is None and self.guess == self.known):
            return None
        if self.counted is None:
            return sums.new_full((), self.guess) / self.known
        count = sums[1]
        if self.counted.requires_grad:
            count = _Sum.apply(self.counted, count)
        return sums.new_full((), self.guess) / count


class _Sum(torch.autograd.Function):
    """The sum of all parts in place of this process's own."""

    @staticmethod
    def forward(part: Tensor, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        return incoming, None


class Scaled(torch.autograd.Function):
    """A sum times a scale, which is infinite where nothing counts: then `of_nothing` scales the gradient."""

    @staticmethod
    def forward(total: Tensor, scale: Tensor, of_nothing: float) -> Tensor:
        return total * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.of_nothing = inputs[2]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, Slot, None]:
        total, scale = ctx.saved_tensors
        by_scale = incoming * total if ctx.needs_input_grad[1] else None
        return incoming * torch.where(scale.isinf(), ctx.of_nothing, scale), by_scale, None


@dataclass
class Part:
    """What this process adds to the results: they, or what it raised."""

    results: Sequence[Tensor]
    error: Exception | None = None

    @classmethod
    def of(
        cls, compute: Compute, call: Any, shards: tuple[Any, ...], shard: ClassShard | None
    ) -> Part:
        if not _tells(shards):
            return cls(compute(call, shards, shard))
        try:
            return cls(compute(call, shards, shard))
        except Exception as error:
            return cls((), error)

    def told(
        self, loss: str, found: Layout, numbers: Sequence[Tensor], check: Callable[[], None]
    ) -> Tensor:
        """The numbers of all processes; raises on all of them where one has raised."""
        state = FINE if self.error is None else RAISED
        if isinstance(self.error, OutsideDomain):
            state = OUTSIDE
        rows = found.gathered(torch.stack([*numbers, torch.tensor(state, dtype=torch.float64)]))
        states = rows[:, -1].tolist()
        if any(states):
            refuse(loss, states, check, self.error)
        return rows


def refuse(
    loss: str, states: list[float], check: Callable[[], None], own: Exception | None = None
) -> NoReturn:
    """What every process raises where one has; `states` say what became of each."""
    if OUTSIDE in states:
        raise OutsideDomain
    check()
    if own is not None:
        raise own
    errors.fail(RuntimeError, loss, "another process raised an error, which says why")


def _tells(shards: Sequence[Any]) -> bool:
    """Whether errors are told to the other processes: on a GPU they come late, and in a graph not at all."""
    return shards[0].is_cpu and not torch_state.is_compiling()


class Done(NamedTuple):
    """How a call was run."""

    layout: Layout
    axes: Sequence[Sequence[int | None]]  # of its tensors
    shards: tuple[Any, ...]
    call: Any  # that of the shards
    given: tuple[Any, ...]  # its tensors
    divisor: Divisor | None  # of a sum over all processes; None: there is none
    tells: bool  # whether the processes told each other of errors
    results: tuple[Any, ...]


def run(
    loss: str,
    call: Any,
    tensors: tuple[Any, ...],
    compute: Compute,
    check: Callable[[], None],
    told: Rows | None = None,
) -> Done:
    """The results of a call, as DTensors; `compute` gives those of a call of plain tensors.

    `check` tells of values that the loss is not defined at, and where they are in whole tensors. `told` is
    what the processes said when the call was made before: they do not say it again.
    """
    found, axes = layout(loss, call, tensors), call.axes(tensors)
    pairs = zip(tensors, axes, strict=True)
    shards = tuple(found.local(t, own, k) for k, (t, own) in enumerate(pairs))
    shard = found.classes and found.classes.shard
    done = Done(found, axes, shards, call, shards, None, False, ())
    if not any(found.splits):
        results = compute(call, shards, shard)
        placed = (sharded.placed(t, found.mesh, found.everywhere) for t in results)
        return done._replace(results=tuple(placed))
    tells = _tells(shards)
    if call.reduction == "none":
        part = Part.of(compute, call, shards, shard)
        refuses = tells and call.refuses(tensors)
        if refuses and told is None:
            part.told(loss, found, [], check)
        elif part.error is not None:
            raise part.error
        shape = torch.Size(call.shape(*tensors))
        placements = found.placements(range(len(shape)), found.whole)
        placed = (sharded.placed(t, found.mesh, placements, shape) for t in part.results)
        return done._replace(tells=refuses, results=tuple(placed))
    divisor = Divisor.of(call, tensors, shards)
    own, given = call.part(shards, divisor.guess)
    part = Part.of(compute, own, given, shard)
    value = torch.zeros((), dtype=own.dtype) if part.error else part.results[0]
    numbers = [value.detach(), *([] if divisor.counted is None else [divisor.counted.detach()])]
    if told is not None:
        rows = torch.tensor(told, dtype=torch.float64)
    elif tells:
        rows = part.told(loss, found, numbers, check)
    else:
        rows = found.gathered(torch.stack(numbers))
    sums = totals(rows)
    total, scale = _Sum.apply(value, sums[0]), divisor.scale(sums)
    if scale is not None:
        total = Scaled.apply(total, scale, call.of_nothing)
    result = sharded.placed(total.to(call.dtype), found.mesh, found.everywhere)
    return Done(found, axes, shards, own, given, divisor, tells, (result,))


def totals(rows: Tensor) -> Tensor:
    """The sums over all processes, added up in their order."""
    return functools.reduce(torch.add, rows.unbind())
