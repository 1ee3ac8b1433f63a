"""What `fusedloss bench` measures, as tables: the cases, the sweep of sizes, and the targets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

import fusedloss  # noqa: F401  (fills the registry)

from ...front.definition import REGISTRY, Loss

if TYPE_CHECKING:
    from .harness import Result

MEBI = 1 << 20
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
LARGEST = 64 * MEBI

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


LOGITS = "binary_cross_entropy_with_logits"
LARGE = (1024, 32000)

TABLE = (
    Case("MSE 4M", "mse_loss", SIZES["4M"], quick_compile=True),
    Case("BCE 4M", "binary_cross_entropy", SIZES["4M"]),
    Case("BCE with logits 4M", LOGITS, SIZES["4M"], quick_compile=True),
    Case("KL 4M", "kl_div", SIZES["4M"]),
    Case("KL log_target 4M", "kl_div[log_target]", SIZES["4M"]),
    Case("CE 4096x1024", "cross_entropy", SIZES["4M"], quick_compile=True),
    Case("CE 1024x32000", "cross_entropy", LARGE),
    Case("CE 256x128256", "cross_entropy", (256, 128256), quick=False),
    Case(
        "CE smoothing 1024x32000",
        *("cross_entropy", LARGE, "float32", "label_smoothing"),
        quick=False,
        against_plain="cross_entropy",
    ),
    Case("CE bf16 1024x32000", "cross_entropy", LARGE, "bfloat16"),
    Case("CE 8x21x256x256", "cross_entropy", (8, 21, 256, 256)),
    Case("NLL 4096x1024", "nll_loss", SIZES["4M"]),
    Case("triplet 16384x256", "triplet_margin_loss", (16384, 256), quick_compile=True),
)

BEYOND = tuple(
    Case(f"{title} 16M", loss, SIZES["16M"], group="beyond", quick=False)
    for title, loss in (
        ("MSE", "mse_loss"),
        ("BCE", "binary_cross_entropy"),
        ("BCE with logits", LOGITS),
        ("KL", "kl_div"),
        ("KL log_target", "kl_div[log_target]"),
    )
)

OPTIONS = tuple(
    Case(
        f"CE {title} 1024x32000",
        *(loss, LARGE, "float32", option, "options"),
        quick=False,
        against_plain="cross_entropy",
    )
    for title, loss, option in (
        ("weight", "cross_entropy", "weight"),
        ("ignore_index", "cross_entropy", "ignore_index"),
        ("probabilities", "cross_entropy[probabilities]", "plain"),
    )
)

CASES = (*TABLE, *BEYOND, *OPTIONS)


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


THREE = Yardstick("three a - b", _three, _three_held)
DIFFERENCE = Yardstick(
    "x - y", lambda x, y: (x - y,), lambda out, x, y: torch.sub(x, y, out=out[0])
)
CLONE = Yardstick("x.clone()", lambda x, *_: (x.clone(),), lambda out, x, *_: out[0].copy_(x))
# Its gradient is zero but for an entry a row, and so few inputs are read.
ZEROS = Yardstick(
    "zeros_like(x)", lambda x, *_: (torch.zeros_like(x),), lambda out, *_: out[0].zero_()
)


def yardstick(loss: Loss, tensors: Sequence[Tensor]) -> Yardstick:
    if loss.name == "nll_loss":
        return ZEROS
    if len(learned(loss)) == 3:
        return THREE
    return DIFFERENCE if all(t.is_floating_point() for t in tensors) else CLONE


Measure = Callable[["Sequence[Result]"], "float | None"]


@dataclass(frozen=True)
class Target:
    """What must be reached: `measured` of all results, at most or at least `bound`."""

    text: str
    measured: Measure
    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def ratio_of(title: str, other: str) -> Measure:
    """The time of ours over the time of another variant, in the case of this title."""

    def measured(results: Sequence[Result]) -> float | None:
        return next((r.ratio("ours", other) for r in results if r.case.title == title), None)

    return measured


def mean_of(over: str) -> Measure:
    """The geometric mean over the table of another variant's time over ours."""
    return lambda results: geometric_mean(
        r.ratio(over, "ours") for r in results if r.case.group == "table"
    )


def geometric_mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


def worst(
    value: Callable[[Result], float | None], keep: Callable[[Result], bool] = lambda _: True
) -> Measure:
    def measured(results: Sequence[Result]) -> float | None:
        return max((v for r in results if keep(r) and (v := value(r)) is not None), default=None)

    return measured


def _targets() -> Iterator[Target]:
    for size, bounds in (("4M", (1.15, 1.7)), ("16M", (0.45, 0.6))):
        for title in ("MSE", "KL", "BCE", "BCE with logits", "KL log_target"):
            bound = bounds[title not in ("MSE", "KL")]
            yield Target(f"{title} {size} / x - y", ratio_of(f"{title} {size}", "yardstick"), bound)
    for title, bound in (
        ("CE 1024x32000", 0.6),
        ("CE 256x128256", 0.6),
        ("CE 4096x1024", 1.5),
        ("CE 8x21x256x256", 1.0),
        ("CE bf16 1024x32000", 1.0),
    ):
        yield Target(f"{title} / clone()", ratio_of(title, "yardstick"), bound)
    for option in ("weight", "smoothing", "ignore_index", "probabilities"):
        title = f"CE {option} 1024x32000"
        bound = 1.6 if option == "probabilities" else 1.1
        yield Target(f"{title} / plain", ratio_of(title, "plain"), bound)
    yield Target("NLL 4096x1024 / eager", ratio_of("NLL 4096x1024", "eager"), 1.0)
    yield Target("triplet 16384x256 / compile", ratio_of("triplet 16384x256", "compile"), 0.8)
    yield Target("triplet 16384x256 / eager", ratio_of("triplet 16384x256", "eager"), 0.2)
    yield Target("faster than eager, geometric mean", mean_of("eager"), 6.0, at_least=True)
    yield Target("faster than compile, geometric mean", mean_of("compile"), 2.5, at_least=True)
    yield Target("/ eager, the worst of all", worst(lambda r: r.ratio("ours", "eager")), 1.05)
    yield Target(
        "/ eager at 3x5, the worst",
        worst(lambda r: r.ratio("ours", "eager"), lambda r: r.case.numel == 15),
        1.0,
    )
    yield Target("MB beyond inputs and gradient, the most", worst(lambda r: r.excess("ours")), 1.0)
    yield Target(
        "cases whose bits change with the threads",
        lambda results: float(sum(r.same_bits is False for r in results)) if results else None,
        0.0,
    )


TARGETS = tuple(_targets())
