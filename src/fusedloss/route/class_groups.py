"""Losses of plain shards of classes: what the processes of a `class_group` tell each other before they begin.

One exchange says how many classes each has, whether all were asked the same, and whether a label is no class of
any: who meets an error then is not alone with it, while the others wait for what never comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core import errors, plain, shards, torch_state
from ..core.indices import check_range
from ..core.plain import PLAIN
from ..core.shards import ClassShard

LEARNED = ("input", "linear_weight", "linear_bias", "target")  # in the order of a head's gradients
GROUP = "class_group"
OF_ROWS = "sample_weight"
MIXED = 0x1E3779B97F4A7C15  # odd: places times this are all over the words
Given = dict[str, Any]


class Layout(NamedTuple):
    """Which dimension of a loss's arguments holds classes."""

    first: str  # the argument that says how many
    dims: Mapping[str, int]
    of_target: int  # where it holds probabilities


def of_heads(given: Given) -> Layout:
    """Of a linear head."""
    names = ("linear_weight", "linear_bias", "teacher_weight", "teacher_bias")
    dims = {**dict.fromkeys(names, 0), "teacher_logits": -1}
    return Layout("linear_weight", dims, max(_dim(given.get("input")) - 1, 0))


def of_rows(given: Given) -> Layout:
    """Of logits (C), (N, C) or (N, C, d1, ...)."""
    dim = min(max(_dim(given.get("input")) - 1, 0), 1)
    return Layout("input", {"input": dim}, dim)


def settle(loss: str, given: Given, layout: Callable[[Given], Layout]) -> Given:
    """The arguments, with the shard as their `class_group` and of probabilities its own.

    Raises:
        TypeError, ValueError: no group; one that this process is no member of.
        RuntimeError: DTensors; probabilities of other classes than the shards have.
        ValueError: arguments that differ between the processes.
        IndexError: a label that is no class of any; its position is named.
    """
    group, found = _group(loss, given[GROUP]), _Facts(loss, given, layout(given))
    device = found.device
    told = torch.tensor(found.numbers, dtype=torch.int64, device=device)
    ranks = group.size()
    every = told.new_empty(ranks * len(told))
    shards.of(group).all_gather_into_tensor(every, told, group=group)
    facts = [_Told(*row) for row in every.view(ranks, -1).tolist()]
    sizes = tuple(max(fact.classes, 0) for fact in facts)
    needed = tuple(any(f.needed >> k & 1 for f in facts) for k in range(len(LEARNED)))
    shard = ClassShard(group, group.rank(), sizes, True, needed)
    if len({fact.print for fact in facts}) > 1:
        _refuse_difference(loss, group, found.words)
    for name, value in given.items():
        if isinstance(value, Tensor) and hasattr(value, "device_mesh"):
            errors.fail(
                RuntimeError,
                loss,
                f"{name} is a DTensor beside class_group, which is for plain shards: a DTensor says by its "
                "placements how it is sharded. Drop class_group, or pass to_local()",
            )
    labelled = [f for f in facts if f.lowest <= f.highest and f.classes >= 0]
    if any(f.lowest < 0 or f.highest >= shard.classes for f in labelled):
        _refuse_label(loss, shard, found)
    for name, prints in (
        ("target", [f.labels for f in facts]),
        (OF_ROWS, [f.shares for f in facts]),
    ):
        if len(set(prints)) > 1:
            _refuse_values(loss, group, name, given[name])
    return {**given, GROUP: shard, "target": _of_shard(loss, shard, facts, found)}


class _Told(NamedTuple):
    """What a process tells the others."""

    classes: int
    print: int  # of what must be the same on all
    needed: int  # bit by bit, the gradients
    lowest: int  # of the labels
    highest: int
    labels: int  # what tells them from others, and those of rows' weights
    shares: int
    probabilities: int  # how many the target holds of a row; -1: labels


class _Facts:
    """Of the arguments of this process."""

    def __init__(self, loss: str, given: Given, layout: Layout) -> None:
        self.layout, self.given = layout, given
        first, target = given.get(layout.first), given.get("target")
        self.target = target if isinstance(target, Tensor) else None
        self.classes = _size(first, layout.dims[layout.first])
        self.soft = self.target is not None and self.target.is_floating_point()
        self.ignore_index = -100
        with contextlib.suppress(TypeError):  # of what is no index the checks tell
            self.ignore_index = operator.index(given.get("ignore_index", -100))
        learns = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.words = {n: self._word(n, v, learns) for n, v in given.items() if n != GROUP}
        needs = [learns and getattr(given.get(n), "requires_grad", False) for n in LEARNED]
        if given.get("reduction", "none") == "none":  # what backward exchanges
            self.words["input.requires_grad"] = str(needs[0])
        text = repr(sorted(self.words.items())).encode()
        own = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        self.numbers = [
            self.classes,
            own,
            sum(need << k for k, need in enumerate(needs)),
            *self._labels(),
            _print(given.get(OF_ROWS)),
            _size(self.target, layout.of_target) if self.soft else -1,
        ]

    @property
    def device(self) -> torch.device:
        input = self.given.get("input")
        return input.device if isinstance(input, Tensor) else torch.device("cpu")

    def _word(self, name: str, value: Any, learns: bool) -> str:
        """Of an argument, but for how many classes it has of all."""
        if not isinstance(value, Tensor):
            known = value is None or isinstance(value, (bool, int, float, str))
            return repr(value) if known else type(value).__name__
        shape: list[Any] = list(value.shape)
        dim = self.layout.dims.get(name, len(shape))
        if name == "target" and self.soft:
            dim = self.layout.of_target
        if -len(shape) <= dim < len(shape) and (name == "target" or shape[dim] == self.classes):
            shape[dim] = "C"
        kind = "" if type(value) in PLAIN else f"{type(value).__name__} of "
        text = f"{kind}{value.dtype} {shape} on {value.device.type}".replace("'", "")
        if name not in LEARNED:
            if not shape and _readable(value):
                text += f", {value.item()}"  # a setting
            if learns and value.requires_grad:
                text += ", which requires a gradient"
        return text.replace("torch.", "")

    def _labels(self) -> tuple[int, int, int]:
        """The lowest and the highest of the labels that count, and the print of all."""
        target = self.target
        if target is None or self.soft or target.is_complex() or not _readable(target):
            return 0, -1, 0
        labels = target.detach().to(torch.int64).flatten()
        counted = labels[labels != self.ignore_index]
        if not counted.numel():
            return 0, -1, _print(labels)
        return int(counted.min()), int(counted.max()), _print(labels)


def _dim(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def _size(value: Any, dim: int) -> int:
    """Of a dimension, if there is one."""
    return value.shape[dim] if isinstance(value, Tensor) and value.dim() > dim else -1


def _readable(tensor: Tensor) -> bool:
    return not (
        tensor.is_meta
        or hasattr(tensor, "device_mesh")
        or torch_state.is_wrapped(tensor)
        or plain.gap(tensor) == plain.FREED
    )


def _print(values: Any) -> int:
    """What tells numbers from others, and from the same in another order."""
    if not isinstance(values, Tensor) or values.is_complex() or not _readable(values):
        return 0
    values = values.detach().flatten()
    words = (
        values.double().view(torch.int64) if values.is_floating_point() else values.to(torch.int64)
    )
    places = torch.arange(1, words.numel() + 1, device=words.device)
    places = places * MIXED
    return int(((words ^ (words >> 32)) * (places ^ (places >> 29) | 1)).sum())  # modulo 2**64


def _group(loss: str, group: Any) -> Any:
    """The process group that is meant."""
    distributed = sys.modules.get("torch.distributed")
    meshes = sys.modules.get("torch.distributed.device_mesh")
    absent = (
        "class_group is a group of which this process is no member: only its members call the loss"
    )
    if meshes is not None and isinstance(group, meshes.DeviceMesh):
        if group.ndim != 1:
            words = (
                f"class_group is a mesh of {group.ndim} dimensions, and one must hold the classes"
            )
            errors.fail(ValueError, loss, f"{words}: pass that dimension of it, such as mesh['tp']")
        if group.get_coordinate() is None:
            errors.fail(ValueError, loss, absent)
        group = group.get_group()
    if type(group) is int:  # what torch.distributed.new_group gives those that are not in it
        errors.fail(ValueError, loss, absent)
    kind = getattr(distributed, "ProcessGroup", None)
    if kind is None or not isinstance(group, kind):
        got = type(group).__name__
        words = "argument 'class_group' must be a ProcessGroup or a DeviceMesh of one dimension"
        errors.fail(TypeError, loss, f"{words}, not {got}")
    return group


def _all_of(group: Any, own: Any) -> list[Any]:
    """What each process has to say of an error."""
    found: list[Any] = [None] * group.size()
    shards.of(group).all_gather_object(found, own, group=group)
    return found


def _refuse_difference(loss: str, group: Any, words: dict[str, str]) -> NoReturn:
    every = _all_of(group, words)
    for name in sorted({name for each in every for name in each}):
        said = [each.get(name, "absent") for each in every]
        if len(set(said)) > 1:
            by_rank = ", ".join(f"{word} on rank {rank}" for rank, word in enumerate(said))
            errors.fail(
                ValueError,
                loss,
                f"{name} differs between the processes of class_group: {by_rank} of it. Each has its own "
                "classes (C) and all else alike",
            )
    raise AssertionError("they are alike")


def _refuse_values(loss: str, group: Any, name: str, own: Tensor) -> NoReturn:
    every = [t.flatten().tolist() for t in _all_of(group, own.detach().cpu())]
    for at, values in enumerate(zip(*every, strict=True)):
        if len({*map(repr, values)}) > 1:
            by_rank = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            errors.fail(
                ValueError,
                loss,
                f"{name} differs between the processes of class_group, each of which needs that of all rows: "
                f"{name}{errors.position(at, own.shape)} is {by_rank}",
            )
    raise AssertionError("they are alike")


def _refuse_label(loss: str, shard: ClassShard, found: _Facts) -> NoReturn:
    words = ""
    assert found.target is not None
    try:
        check_range(loss, found.target, shard.classes, found.ignore_index)
    except IndexError as error:
        words = str(error)
    raise IndexError(
        next(filter(None, _all_of(shard.group, words)), f"{loss}: a label out of range")
    )


def _of_shard(loss: str, shard: ClassShard, facts: Sequence[_Told], found: _Facts) -> Any:
    """The target; of probabilities those of the shard's classes."""
    target, dim = found.target, found.layout.of_target
    if target is None or not found.soft:
        return found.given.get("target")
    counts = tuple(fact.probabilities for fact in facts)
    if all(count == shard.classes for count in counts):
        if target.requires_grad:
            return shard.own(target, dim)
        return target.narrow(dim, shard.first, shard.count)
    if counts != shard.sizes and all(fact.classes >= 0 for fact in facts):
        errors.fail(
            RuntimeError,
            loss,
            f"target holds probabilities of {list(counts)} classes on the ranks of class_group, whose shards "
            f"have {list(shard.sizes)}, {shard.classes} in all: pass those of the shard, or all",
        )
    return target


@torch_state.untraced
def untraced(run: Callable[[], Any]) -> Any:
    """What runs where dynamo does not trace: the exchange needs what tensors hold."""
    return run()
