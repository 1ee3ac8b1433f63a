"""What `fusedloss bench` measures: the cases that the losses name, the sweep of sizes, the yardsticks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

import fusedloss  # noqa: F401  (fills the registry)

from ...front.definition import REGISTRY, Loss

DTYPES = ("float32", "float64", "bfloat16", "float16")
SIZES: dict[str, tuple[int, ...]] = {
    "15": (3, 5),
    "256": (16, 16),
    "4K": (64, 64),
    "64K": (256, 256),
    "1M": (1024, 1024),
    "4M": (4096, 1024),
    "16M": (16384, 1024),
    "64M": (65536, 1024),
}
QUICK_SIZES = ("15", "64K", "1M")
LARGEST = 64 << 20

VARIANTS = {
    "ours": "fusedloss",
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "yardstick": "yardstick, fresh output",
    "held": "yardstick, output already there",
    "plain": "fusedloss without the option",
}
CHOICES = ("ours", "eager", "compile", "yardstick")


@dataclass(frozen=True)
class Case:
    """One loss with one option set, forward and backward, at one shape and dtype.

    `against_plain` names the registry row whose default form is measured beside it.
    """

    title: str
    loss: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    option: str = ""
    group: str = "table"  # or "beyond" the caches, "options", "sweep"
    quick: bool = True
    quick_compile: bool = False
    against_plain: str | None = None
    # The targets: times another variant's time.
    at_most: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def row(self) -> Loss:
        return REGISTRY[self.loss]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def settings(self, tensors: tuple[Tensor, ...], generator: Generator) -> dict[str, Any]:
        option = self.option or next(iter(self.row.options))
        reduction = "batchmean" if "batchmean" in self.row.reductions else "mean"
        return {**self.row.options[option](tensors, generator), "reduction": reduction}


def learned(loss: Loss) -> tuple[int, ...]:
    """The arguments that receive gradients in training: all differentiable ones but the target."""
    names = list(inspect.signature(loss.function).parameters)
    return tuple(k for k in loss.differentiable if names[k] != "target")


# `--linear` times the others.
TIMED = tuple(key for key, row in REGISTRY.items() if row.kind != "heads")


def calls() -> tuple[str, ...]:
    """The losses, each by the first of its registry rows."""
    first = {REGISTRY[key].name: key for key in reversed(TIMED)}
    return tuple(key for key in TIMED if key in first.values())


def _cases(*groups: str) -> Iterator[Case]:
    for group in groups:
        for loss, row in REGISTRY.items():
            for each in row.bench:
                if each.group == group:
                    shown = (each.title, loss, each.shape, each.dtype, each.option, group)
                    quick = each.quick and group == "table"
                    yield Case(*shown, quick, each.compiled, each.beside, each.at_most)


CASES = tuple(_cases("table", "beyond", "options"))
# Large ones, and then what a call costs.
GPU_CASES = (
    *_cases("gpu"),
    *(Case(f"{loss} 3x5", loss, SIZES["15"], group="small") for loss in calls()),
)


def sweep(
    losses: Iterable[str], dtypes: Iterable[str], sizes: dict[str, tuple[int, ...]]
) -> Iterator[Case]:
    """Every registry row in its default form, in each dtype, at each size."""
    for loss in losses:
        for dtype in dtypes:
            for name, shape in sizes.items():
                yield Case(f"{loss} {dtype} {name}", loss, shape, dtype, group="sweep")


Operation = Callable[..., Any]


@dataclass(frozen=True)
class Yardstick:
    """An operation that moves the bytes of a loss with its gradient, and no more.

    `fresh(*tensors)` allocates its result, as a gradient must be; `held(out, *tensors)` writes
    to `out`, a sequence of results that are there.
    """

    label: str
    fresh: Operation
    held: Operation


def _three(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    return a - b, a - c, b - c


def _three_held(out: Sequence[Tensor], a: Tensor, b: Tensor, c: Tensor) -> None:
    torch.sub(a, b, out=out[0])
    torch.sub(a, c, out=out[1])
    torch.sub(b, c, out=out[2])


def _two_held(out: Sequence[Tensor], x: Tensor, y: Tensor, z: Tensor) -> None:
    torch.sub(x, y, out=out[0])
    out[1].copy_(z)


def _copies_held(out: Sequence[Tensor], x: Tensor, y: Tensor, *_: Tensor) -> None:
    out[0].copy_(x)
    out[1].copy_(y)


THREE = Yardstick("three a - b", _three, _three_held)
# Two gradients, of three inputs of their size or of two.
TWO = Yardstick("x - y, z.clone()", lambda x, y, z: (x - y, z.clone()), _two_held)
COPIES = Yardstick("x.clone(), y.clone()", lambda x, y, *_: (x.clone(), y.clone()), _copies_held)
DIFFERENCE = Yardstick(
    "x - y", lambda x, y, *_: (x - y,), lambda out, x, y, *_: torch.sub(x, y, out=out[0])
)
CLONE = Yardstick("x.clone()", lambda x, *_: (x.clone(),), lambda out, x, *_: out[0].copy_(x))
# Its gradient is zero but for an entry a row, and so few inputs are read.
ZEROS = Yardstick(
    "zeros_like(x)", lambda x, *_: (torch.zeros_like(x),), lambda out, *_: out[0].zero_()
)


def yardstick(loss: Loss, tensors: Sequence[Tensor]) -> Yardstick:
    if loss.name == "nll_loss":
        return ZEROS
    gradients = len(learned(loss))
    if gradients == 3:
        return THREE
    if gradients == 2:
        return COPIES if loss.rows else TWO
    return DIFFERENCE if all(t.is_floating_point() for t in tensors) else CLONE
