"""Shards of classes: what a process has of them, and what it exchanges with the others of its group.

A tensor is the same on all processes of the group, or each has its own classes of it; the derivative by one of
the first kind is the same on all, too, unless the caller adds up what each found. Nothing here imports
torch.distributed: who hands over a group has done so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import torch_state


@dataclass(frozen=True, slots=True)
class ClassShard:
    """The classes of this process: consecutive ones, after those of the ranks before."""

    group: Any  # a ProcessGroup
    rank: int
    sizes: tuple[int, ...]  # of all ranks; none: to be asked for when the call runs
    adds: bool = (
        True  # the input's gradient up over the group; or each process keeps its part of that
    )
    needed: tuple[bool, ...] = ()  # by which tensors of the call some process needs gradients

    @property
    def first(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def count(self) -> int:
        return self.sizes[self.rank]

    @property
    def classes(self) -> int:
        """Of all processes."""
        return sum(self.sizes)

    def __str__(self) -> str:
        """By which an operator of torch knows it, and `parsed` makes it again."""
        lists = (",".join(str(int(n)) for n in each) for each in (self.sizes, self.needed))
        return "/".join([str(self.group.group_name), str(int(self.adds)), *lists])

    def like_whole(self, x: Tensor, dim: int) -> Tensor:
        """Of the shape with all classes, without memory."""
        shape = (*x.shape[:dim], self.classes, *x.shape[dim + 1 :])
        return torch.empty(shape, dtype=x.dtype, device="meta")

    def all_gather(self, part: Tensor) -> Tensor:
        """What all processes have, along a new first dimension; of one shape on each."""
        ranks = len(self.sizes)
        found = part.new_empty(ranks * part.shape[0], *part.shape[1:])
        if found.numel():
            of(self.group).all_gather_into_tensor(found, part.contiguous(), group=self.group)
        return found.view(ranks, *part.shape)

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if part.numel():
            of(self.group).all_reduce(part, group=self.group)
        return part

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """The classes of all processes, of a tensor that has this one's in a dimension; differentiable."""
        found: Tensor = _Whole.apply(x, self, dim)
        return found

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Of a tensor with all classes, this process's; differentiable."""
        found: Tensor = _Own.apply(x, self, dim)
        return found

    def spread(self, x: Tensor) -> Tensor:
        """The tensor, whose derivatives on all processes add up."""
        found: Tensor = _Spread.apply(x, self)
        return found

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes; differentiable."""
        found: Tensor = _Total.apply(x, self)
        return found

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        """As `whole`, of plain tensors."""
        lacking = max(self.sizes) - x.shape[dim]
        if lacking:
            padding = x.new_zeros(*x.shape[:dim], lacking, *x.shape[dim + 1 :])
            x = torch.cat([x, padding], dim)
        parts = zip(self.all_gather(x), self.sizes, strict=True)
        return torch.cat([part.narrow(dim, 0, size) for part, size in parts], dim)


def parsed(text: str) -> ClassShard | None:
    """The shard of an operator's argument; "" stands for none."""
    if not text:
        return None
    name, *rest = text.rsplit("/", 3)
    (adds,), sizes, needed = ([int(n) for n in part.split(",") if n] for part in rest)
    group = torch_state.process_group(name)
    return ClassShard(group, group.rank(), tuple(sizes), bool(adds), tuple(map(bool, needed)))


def of(group: Any) -> Any:
    """torch.distributed, which whoever has a group has imported."""
    return sys.modules["torch.distributed"]


class _Whole(Function):
    @staticmethod
    def forward(x: Tensor, shard: ClassShard, dim: int) -> Tensor:
        return shard.gathered(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.shard, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Own.apply(g, ctx.shard, ctx.dim), None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Any:
        return _Whole.apply(t, ctx.shard, ctx.dim)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, shard: ClassShard, dim: int) -> Any:
        return _Whole.apply(x.movedim(dims[0], 0), shard, dim + 1), 0


class _Own(Function):
    @staticmethod
    def forward(x: Tensor, shard: ClassShard, dim: int) -> Tensor:
        return x.narrow(dim, shard.first, shard.count).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.shard, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Whole.apply(g, ctx.shard, ctx.dim), None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Any:
        return _Own.apply(t, ctx.shard, ctx.dim)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, shard: ClassShard, dim: int) -> Any:
        return _Own.apply(x.movedim(dims[0], 0), shard, dim + 1), 0


class _Spread(Function):
    @staticmethod
    def forward(x: Tensor, shard: ClassShard) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shard = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Total.apply(g, ctx.shard), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: Any) -> Any:
        return _Spread.apply(t, ctx.shard)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, shard: ClassShard) -> Any:
        return _Spread.apply(x, shard), dims[0]


class _Total(Function):
    @staticmethod
    def forward(x: Tensor, shard: ClassShard) -> Tensor:
        return shard.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shard = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Spread.apply(g, ctx.shard), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: Any) -> Any:
        return _Total.apply(t, ctx.shard)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, shard: ClassShard) -> Any:
        return _Total.apply(x, shard), dims[0]
