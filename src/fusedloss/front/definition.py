"""The records that everything hangs on: the formula of a pointwise loss, and the row of a public loss.

Kernels, documentation, tests and benchmarks read these records; none of them repeats a formula.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Generator, Tensor

Options = Callable[[tuple[Tensor, ...], Generator], dict[str, Any]]
Example = Callable[[tuple[int, ...], torch.dtype, Generator], tuple[Tensor, ...]]


def plain(_tensors: tuple[Tensor, ...], _generator: Generator) -> dict[str, Any]:
    """The option set with every keyword at its default."""
    return {}


NOTHING: Final[Mapping[str, Any]] = {}
PLAIN: Final[Mapping[str, Options]] = {"plain": plain}


class Bounds(NamedTuple):
    """The greatest error of (value, gradient) of one element or row, in ulps as docs/accuracy.md defines them.

    `fusedloss verify` holds every path to them.
    """

    float32: tuple[float, float] = (2.0, 2.0)
    float64: tuple[float, float] = (2.0, 2.0)
    formula: tuple[float, float] = (2.0, 2.0)  # in either type
    triton: tuple[float, float] | None = (
        None  # float32 on a GPU, where sums over classes are float32
    )


class BenchCase(NamedTuple):
    """A case of `fusedloss bench`: the loss forward and backward at one shape, with one option set."""

    title: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    option: str = ""
    group: str = "table"  # or "beyond" the caches, "options", "gpu"
    quick: bool = True  # of the table: in a quick run too
    compiled: bool = False  # by torch.compile in a quick run and on a GPU too
    beside: str | None = None  # the loss whose default form is measured beside it
    # The targets: times at most so many times those of another variant, or of what moves the same bytes.
    at_most: Mapping[str, float] = NOTHING


def elements(
    label: str,
    near: float | None = None,
    beyond: float | None = None,
    compiled: bool = False,
    gpu: bool = True,
    yardstick: str = "x - y",
) -> tuple[BenchCase, ...]:
    """The cases of a pointwise loss; with targets within and beyond the caches, beside what moves its bytes."""

    def target(most: float | None) -> dict[str, float]:
        return {} if most is None else {yardstick: most}

    large: tuple[BenchCase, ...] = (
        BenchCase(f"{label} 64M", (64, 1 << 20), group="gpu", compiled=compiled),
        BenchCase(f"{label} 64M bf16", (64, 1 << 20), "bfloat16", group="gpu"),
    )
    return (
        BenchCase(f"{label} 4M", (4096, 1024), compiled=compiled, at_most=target(near)),
        BenchCase(f"{label} 16M", (16384, 1024), group="beyond", at_most=target(beyond)),
        *(large if gpu else ()),
    )


class Loss(NamedTuple):
    """One public loss: what tests, documentation and benchmarks need to know of it.

    `example(shape, dtype, generator)` draws the tensor arguments from the loss's domain;
    `options` names the keyword sets to try, each made from those tensors. `differentiable` are the
    positions of the arguments that receive gradients. `extensions` are option sets that PyTorch lacks.
    A loss without `reductions` gives rows alone. `composed` is what PyTorch's users write where it has no
    function of the name, or one of fewer options; `written_out` the same by torch operations, where PyTorch's
    own lacks half types and derivatives.
    """

    function: Callable[..., Any]
    module: str
    example: Example
    options: Mapping[str, Options] = PLAIN
    reductions: tuple[str, ...] = ("none", "mean", "sum")
    differentiable: tuple[int, ...] = (0, 1)
    kind: str = "pointwise"  # of element and element; all others have an axis of a row
    variant: str = ""  # tells rows of one function apart
    indices: int | None = None  # the argument that holds class indices
    dims: int | None = None  # the most dimensions of the first argument; None: any
    whole: tuple[int, ...] = ()  # the arguments that belong to all rows: a head's weight
    learned: tuple[str, ...] = ()  # the keywords that receive gradients
    composed: Callable[..., Tensor] | None = None
    written_out: Callable[..., Tensor] | None = None
    extensions: Mapping[str, Options] = NOTHING
    bounds: Bounds = Bounds()
    triton: bool = True  # whether a kernel on GPUs serves it; torch operations do where not
    bench: tuple[BenchCase, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def key(self) -> str:
        return f"{self.name}[{self.variant}]" if self.variant else self.name

    @property
    def rows(self) -> bool:
        return self.kind != "pointwise"

    @property
    def torch_function(self) -> Callable[..., Tensor]:
        return self.composed or getattr(torch.nn.functional, self.name)

    @property
    def reference(self) -> Callable[..., Tensor]:
        """PyTorch's function in every type, and with every derivative."""
        return self.written_out or self.torch_function

    @property
    def reduced(self) -> Callable[..., Tensor]:
        """The function, with a `reduction` even if it has none of its own."""
        return self.function if self.reductions else functools.partial(_reduced, self.function)


def _reduced(
    function: Callable[..., Tensor], *tensors: Tensor, reduction: str = "none", **options: Any
) -> Tensor:
    rows = function(*tensors, **options)
    return rows if reduction == "none" else getattr(rows, reduction)()


def _undefined(*_: Any, **__: Any) -> NoReturn:
    raise TypeError("a row is of no function yet: @loss gives it one")


def row(example: Example, options: Mapping[str, Options] | None = None, **more: Any) -> Loss:
    """A row for `@loss`, which knows the function and the module."""
    return Loss(_undefined, "", example, options or PLAIN, **{"kind": "", **more})


REGISTRY: dict[str, Loss] = {}


def register(loss: Loss) -> Loss:
    if loss.key in REGISTRY:
        raise ValueError(f"register: {loss.key} is registered already")
    REGISTRY[loss.key] = loss
    return loss


def uniform(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator, low: float, high: float
) -> Tensor:
    """A sample between `low` and `high`: the building block of the examples."""
    values = torch.rand(shape, dtype=torch.float64, generator=generator)
    return (low + (high - low) * values).to(dtype)


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def normals(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> tuple[Tensor, Tensor]:
    return normal(shape, dtype, generator), normal(shape, dtype, generator)


def rates(
    shape: tuple[int, ...], dtype: torch.dtype, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Positive numbers, such as expected counts."""
    low, high = 0.1, 5.0
    return uniform(shape, dtype, generator, low, high), uniform(shape, dtype, generator, low, high)


def weights(tensors: tuple[Tensor, ...], generator: Generator) -> Tensor:
    """Of the input's shape."""
    return uniform(tensors[0].shape, tensors[0].dtype, generator, 0.1, 2)


def options(**settings: Any) -> dict[str, Options]:
    """The option sets with each setting alone, none of them, and all; a function draws a tensor."""

    def given(names: tuple[str, ...]) -> Options:
        return lambda tensors, generator: {
            n: v(tensors, generator) if callable(v := settings[n]) else v for n in names
        }

    sets = {name: given((name,)) for name in settings}
    return {"plain": plain, **sets, **({"all": given(tuple(settings))} if len(sets) > 1 else {})}
