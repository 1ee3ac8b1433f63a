"""What losses on several processes have to know of one another: `count`.

The losses themselves speak to nobody where their tensors are plain ones. torch.distributed is imported where
a group is given, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .core import errors, reduce, sharded

__all__ = ["count"]
NAME = "distributed.count"


@torch.no_grad()
def count(
    target: Tensor | Sequence[Tensor],
    *groups_or_meshes: Any,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    averaged: bool = True,
) -> Tensor:
    r"""What a mean over the targets of all processes divides by: the `denominator` of the losses.

    A mean of a process's own counts its own targets alone, and the mean of such means is no mean of all where
    the counts differ: padding, `ignore_index`, class weights, a last batch that is shorter. With
    :math:`N = \sum_r n_r` over the processes, and over the steps of an accumulation,

    .. math::
        \nabla \frac{\sum_r S_r}{N} = \frac{1}{R} \sum_r \nabla \frac{S_r}{N / R}

    so that under a wrapper that averages gradients over R processes (DDP, FSDP) each divides its sum
    :math:`S_r` by :math:`N / R`, and under one that adds them up by N.

    Args:
        target: class indices, of any shape; or a list of them, of all steps until the optimizer's. Of floating
            point, such as those of a regression, all elements count. DTensors count as a whole, on every
            process of their mesh alike; of what is sharded and plain each process has its own part.
        groups_or_meshes: process groups, or device meshes with all their dimensions, over which gradients are
            reduced and targets differ: of data parallelism, and of context parallelism where sequences are
            split. Not those whose processes hold the same targets, as of tensor parallelism.
        weight: of each class, as the loss has it: the sum of those of the targets that count.
        ignore_index: targets that do not count.
        averaged: whether gradients are averaged over these groups, as DDP and FSDP do, or added up.

    Returns:
        A 0-dim float64 tensor beside the targets, the same on all processes. With groups this is a collective,
        which all of their processes must call.

    Raises:
        TypeError: targets that are no tensors; a group that is none.
        ValueError: no targets at all; a group of which this process is no member.
        IndexError: with a `weight`, a target that is no class.
    """
    targets = [target] if isinstance(target, Tensor) else list(_listed(target))
    if not targets:
        errors.fail(ValueError, NAME, "target is an empty list: pass the targets of each step")
    for k, each in enumerate(targets):
        errors.tensors(NAME, TypeError, **{f"target[{k}]" if len(targets) > 1 else "target": each})
    groups = [group for each in groups_or_meshes for group in _groups(each)]
    found = torch.stack([_counted(each, weight, ignore_index) for each in targets]).sum(0)
    for group in groups:
        torch.distributed.all_reduce(found, group=group)
    total, outside = found
    if weight is not None and outside:  # on all processes, or the others would wait
        words = f"target holds class indices that are none of weight's {len(weight)} classes"
        errors.fail(IndexError, NAME, words)
    return total / math.prod(group.size() for group in groups) if averaged else total


def _listed(target: Any) -> Iterable[Tensor]:
    if not isinstance(target, Iterable):
        errors.tensors(NAME, TypeError, target=target)
    return target


def _counted(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What counts of one step, and how many targets are no class: on this process, of a DTensor on its mesh."""
    target, exact = target.detach(), reduce.exact(target)
    if target.is_floating_point():
        return torch.tensor([target.numel(), 0.0], dtype=exact, device=target.device)
    index = target.to(torch.int64)
    kept = index != ignore_index
    if weight is None:
        count = sharded.whole(kept.sum().to(exact))
        return torch.stack([count, torch.zeros_like(count)])
    weight = sharded.whole(weight.detach())
    classes = len(weight)
    if sharded.is_sharded(index):
        weight = sharded.replicated(weight, index)
    outside = kept & ((index < 0) | (index >= classes))
    own = weight[torch.where(kept & ~outside, index, 0)]
    sums = torch.where(kept, own, 0).sum(dtype=exact), outside.sum().to(exact)
    return torch.stack([sharded.whole(each) for each in sums])


def _groups(given: Any) -> list[Any]:
    """The process groups of a mesh, or the one that is given."""
    import torch.distributed as dist

    if not dist.is_available():
        errors.fail(
            TypeError, NAME, "this torch was built without torch.distributed: pass no groups"
        )
    if isinstance(given, dist.DeviceMesh):
        if given.get_coordinate() is None:
            errors.fail(
                ValueError, NAME, f"this process, rank {dist.get_rank()}, is not in {given}"
            )
        return [given.get_group(dim) for dim in range(given.ndim)]
    if given is dist.GroupMember.NON_GROUP_MEMBER:
        words = "is no member of the group, and must not call this with it"
        errors.fail(ValueError, NAME, f"this process, rank {dist.get_rank()}, {words}")
    if not isinstance(given, dist.ProcessGroup):
        words = "must be process groups or device meshes (torch.distributed.group.WORLD is all processes)"
        errors.fail(TypeError, NAME, f"groups_or_meshes {words}, got {type(given).__name__}")
    return [given]
