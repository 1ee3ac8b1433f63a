"""Calls drawn at random, for any loss of the registry: any types, shapes and layouts, special numbers too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Generator, Tensor

from fusedloss.front.definition import REGISTRY, Loss

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.uint8, torch.int32, torch.int16, torch.int8, torch.uint16)
ODD = (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.int32)
NAN, INF = math.nan, math.inf
MOST = 3000  # elements of a tensor


def drawn(kind: str) -> dict[str, list[Loss]]:
    """The rows of each loss of a kind that PyTorch has, by its name."""
    known = dir(torch.nn.functional)
    rows = [row for row in REGISTRY.values() if row.kind == kind and row.name in known]
    return {
        name: [r for r in rows if r.name == name] for name in dict.fromkeys(r.name for r in rows)
    }


KINDS_DRAWN = ("pointwise", "rows", "triplet", "sequences", "pair", "margins", "multilabel")
POINTWISE, ROWS, TRIPLETS, SEQUENCES, PAIRS, MARGINS, MULTILABEL = map(drawn, KINDS_DRAWN)


@dataclass
class Call:
    name: str
    tensors: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[int, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        shown = [show(t) for t in self.tensors]
        shown += [f"{k}={show(v)}" for k, v in self.options.items()]
        return f"{self.name}({', '.join(shown)}), gradients by {self.wanted}, seed {self.seed}"


def show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    kind = str(value.dtype).removeprefix("torch.")
    whole = f"{kind}{list(value.shape)} strides {list(value.stride())}"
    return f"{whole} {value.tolist()}" if value.numel() <= 12 else whole


def domain(row: Loss, position: int) -> str:
    """What numbers a loss takes, as its example shows."""
    x = row.example((64,), torch.float64, Generator().manual_seed(0))[position]
    if x.min() >= 0:
        return "probabilities" if x.max() <= 1 else "rates"
    return "logs" if x.max() <= 0 else "normal"


def parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(torch.nn.functional, name)).parameters


# What to pass


def values(kind: str, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """In float64; 'special' has what is hard: infinities, NaN of any payload, limits, zeros."""
    if kind == "probabilities":
        return torch.rand(shape, dtype=torch.float64, generator=generator)
    if kind == "rates":
        return 5 * torch.rand(shape, dtype=torch.float64, generator=generator)
    x = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    if kind == "logs":
        return -x.abs()
    if kind == "special" and x.numel():
        payload = torch.tensor(0x7FF0DEADBEEF0001, dtype=torch.int64).view(torch.float64).item()
        specials = torch.tensor(
            [
                INF,
                -INF,
                NAN,
                -NAN,
                payload,
                0.0,
                -0.0,
                1.0,
                1e-45,
                5e-324,
                3e38,
                -1e300,
                65504.0,
                1e4,
            ],
            dtype=torch.float64,
        )
        drawn = specials[torch.randint(len(specials), shape, generator=generator)]
        hit = torch.rand(shape, generator=generator) < 0.2
        return torch.where(hit, drawn, x)
    return x


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (but for 'expanded' and 'overlapping') in another memory."""
    t = tensor
    if t.dtype is torch.uint16:  # few operations know it
        return laid_out(t.view(torch.int16), layout).view(torch.uint16)
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "flipped":
        return t.flip(tuple(range(t.dim())))
    if layout == "every second" and t.dim():
        return torch.stack((t, t), dim=-1).flatten(-2)[..., ::2]
    if layout == "channels last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        return torch.cat((t.reshape(-1)[:1], t.reshape(-1)))[1 if t.numel() else 0 :].view(t.shape)
    if layout == "expanded" and t.dim() and t.numel():
        return t[..., :1].expand(t.shape)
    if layout == "expanded rows" and t.dim() and t.numel():
        return t[:1].expand(t.shape)
    if layout == "overlapping" and t.dim() > 1 and t.numel():
        steps = (1,) * t.dim()
        return t.contiguous().as_strided(t.shape, steps)
    return t


LAYOUTS = (
    *("contiguous",) * 3,
    "transposed",
    "flipped",
    "every second",
    "channels last",
    "offset",
    "expanded",
    "expanded rows",
    "overlapping",
)
sizes = st.sampled_from((2, 3, 1, 5, 7, 17, 33, 0, 64, 1030))
some = st.integers(0, 9)  # a choice made in one draw out of ten


@st.composite
def shapes(draw: Callable[..., Any], least: int = 0, most: int = 4) -> tuple[int, ...]:
    shape: list[int] = []
    for size in draw(st.lists(sizes, min_size=least, max_size=most)):
        shape.append(size if math.prod(shape) * size <= MOST else 1)
    return tuple(shape)


class Source:
    """What the arguments of one call are drawn from."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw
        self.seed = draw(st.integers(0, 2**32))
        self.generator = Generator().manual_seed(self.seed)
        self.dtype = draw(st.sampled_from(FLOATS))
        self.special = draw(some) > 6

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def rarely(self, least: int) -> bool:
        """As often as one of ten numbers is above `least`."""
        return self.draw(some) > least

    def tensor(self, shape: tuple[int, ...], kind: str) -> Tensor:
        own = self.one_of(*FLOATS, *ODD) if self.rarely(8) else self.dtype
        if own.is_complex or own.is_floating_point:
            hard = self.special and self.draw(st.booleans())
            data = values("special" if hard else kind, shape, self.generator).to(own)
        else:
            data = torch.randint(0, 2, shape, generator=self.generator).to(own)
        return laid_out(data, self.one_of(*LAYOUTS))

    def near(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, one that broadcasts with it, or now and then any."""
        choice = self.draw(some)
        if choice < 7 or not shape:
            return shape
        if choice == 7:
            return tuple(1 if self.draw(st.booleans()) else n for n in shape)
        return shape[1:] if choice == 8 else self.draw(shapes())

    def reductions(self, name: str, rows: list[Loss]) -> dict[str, Any]:
        known = (*rows[0].reductions, *rows[0].reductions)
        options = {"reduction": self.one_of(*known, "avg")}
        if self.rarely(8) and "reduce" in parameters(name):
            options |= {n: self.one_of(True, False, None) for n in ("size_average", "reduce")}
        return options


def pointwise(source: Source, name: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors by the row's example, settings by the defaults that PyTorch gives them."""
    row = source.one_of(*POINTWISE[name])
    shape = source.draw(shapes())
    tensors = [
        source.tensor(source.near(shape) if k else shape, domain(row, k))
        for k in range(len(row.example((1,), torch.float64, source.generator)))
    ]
    options = {}
    for argument, parameter in list(parameters(name).items())[len(tensors) :]:
        default = parameter.default
        if isinstance(default, bool):
            options[argument] = source.draw(st.booleans())
        elif isinstance(default, float):
            options[argument] = source.one_of(default, 0.3, 3, 0.0, -1.0, NAN, INF)
        elif "weight" in argument and source.rarely(6):
            options[argument] = source.tensor(source.near(shape), "probabilities")
    return tensors, options


def triplets(source: Source, name: str) -> tuple[list[Tensor], dict[str, Any]]:
    shape = source.draw(shapes())
    tensors = [source.tensor(source.near(shape), "normal") for _ in range(3)]
    options = {"margin": source.one_of(1.0, 0.5, 3, 0.0, -1.0, NAN, INF)}
    options["swap"] = source.draw(st.booleans())
    if "p" in parameters(name):
        options["p"] = source.one_of(2, 2.0, 1.0, 3.0, 0.7, INF, 0.0, -1.0, NAN)
        options["eps"] = source.one_of(1e-6, 0.0, 0.1)
    return tensors, options


def rows(source: Source, name: str) -> tuple[list[Tensor], dict[str, Any]]:
    shape = source.draw(shapes(1))
    classes = shape[min(len(shape) - 1, 1)]
    x = source.tensor(shape, domain(ROWS[name][0], 0))
    if any(row.indices is None for row in ROWS[name]) and source.rarely(5):
        target = source.tensor(source.near(shape), "probabilities")
        axis = min(target.dim() - 1, 1)
        if target.is_floating_point() and target.dim() and source.draw(st.booleans()):
            target = target / target.sum(axis, keepdim=True)
    else:
        target = indices(source, shape[:1][: len(shape) - 1] + shape[2:], classes)
    options: dict[str, Any] = {}
    if source.rarely(6):
        of = source.draw(shapes()) if source.rarely(8) else (classes,)
        options["weight"] = source.tensor(of, "probabilities")
    if source.rarely(6):
        options["ignore_index"] = source.one_of(0, 1, -1, 255, 2**62, 2**70, 1.5)
    if "label_smoothing" in parameters(name) and source.rarely(5):
        options["label_smoothing"] = source.one_of(0.1, 0.5, 1.0, 0, -0.1, 1.5, NAN)
    return [x, target], options


def sequences(source: Source, name: str) -> tuple[list[Tensor], dict[str, Any]]:
    """But with no label out of range, at which PyTorch reads, and writes, what memory is there."""
    frames, n, most = source.one_of(1, 2, 7, 40), source.one_of(1, 2, 5), source.one_of(0, 1, 3)
    classes = source.one_of(2, 5, 33) if most else 1
    counts = torch.randint(most + 1, (n,), generator=source.generator)
    lengths = torch.randint(frames + 1, (n,), generator=source.generator)
    x = source.tensor((frames, n, classes), "logs")
    of = (n, most) if source.draw(st.booleans()) else (int(counts.sum()),)
    blank = source.one_of(0, 0, 0, classes - 1, 1, -1)
    labels = torch.randint(classes, of, generator=source.generator)
    labels = torch.where(
        labels == blank, (labels + 1) % classes, labels
    )  # its gradient is wrong there
    given: list[Any] = [
        laid_out(t.to(source.one_of(*INTEGERS[:4])), source.one_of("contiguous", "every second"))
        for t in (labels, lengths, counts)
    ]
    if labels.dim() == 1:  # whose gaps PyTorch reads
        given[0] = given[0].contiguous()
    if source.rarely(7):
        place = source.one_of(1, 2)
        given[place] = given[place] + source.one_of(-1, 1)  # beyond what there is, or negative
    if n == 1 and source.draw(st.booleans()):
        x = x[:, 0]
    return [x, *given], {"blank": blank, "zero_infinity": source.draw(st.booleans())}


def indices(source: Source, rows: tuple[int, ...], classes: int) -> Tensor:
    low, high = (-2, classes + 2) if source.rarely(8) else (0, max(classes, 1))
    index = torch.randint(low, high, source.near(rows), generator=source.generator)
    if source.rarely(6):
        ignored = torch.rand(index.shape, generator=source.generator) < source.one_of(0.3, 1.0)
        index = torch.where(ignored, -100, index)
    kinds = (*INTEGERS, *FLOATS, torch.bool) if source.rarely(7) else INTEGERS[:2]
    return laid_out(index.to(source.one_of(*kinds)), source.one_of(*LAYOUTS))


def pairs(source: Source, name: str) -> tuple[list[Tensor], dict[str, Any]]:
    shape = source.draw(shapes(1, 2))
    first, second = (source.tensor(source.near(shape), "normal") for _ in "ab")
    of_pairs = source.near(shape[:-1])
    signs = torch.randint(-1, 2, of_pairs, generator=source.generator)
    target = signs.to(source.one_of(*FLOATS, torch.int64, torch.int32))
    options = {"margin": source.one_of(0, 0.5, -0.5, 3, NAN, INF)}
    return [first, second, laid_out(target, source.one_of(*LAYOUTS))], options


def margins(source: Source, name: str) -> tuple[list[Tensor], dict[str, Any]]:
    shape = source.draw(shapes(0, 2))
    classes = shape[-1] if shape else 1
    x = source.tensor(shape, "normal")
    if name == "multilabel_margin_loss":
        low, high = (-2, classes + 1) if source.rarely(8) else (-1, max(classes, 1))
        sets = torch.randint(low, high, source.near(shape), generator=source.generator)
        return [x, laid_out(sets, source.one_of(*LAYOUTS))], {}
    options: dict[str, Any] = {"p": source.one_of(1, 2, 2.0, 3, True)}
    options["margin"] = source.one_of(1.0, 0.5, 3, 0, -1.0, INF)
    if source.rarely(6):
        of = source.draw(shapes()) if source.rarely(8) else (classes,)
        options["weight"] = source.tensor(of, "probabilities")
    return [x, indices(source, shape[:-1], classes)], options


def multilabel(source: Source, name: str) -> tuple[list[Tensor], dict[str, Any]]:
    shape = source.draw(shapes(1))
    tensors = [source.tensor(shape, "normal"), source.tensor(source.near(shape), "probabilities")]
    options: dict[str, Any] = {}
    if source.rarely(6):
        options["weight"] = source.tensor(source.near(shape), "probabilities")
    return tensors, options


KINDS = (
    (POINTWISE, pointwise),
    (ROWS, rows),
    (TRIPLETS, triplets),
    (SEQUENCES, sequences),
    (PAIRS, pairs),
    (MARGINS, margins),
    (MULTILABEL, multilabel),
)
DRAWN = {name: (rows, make) for losses, make in KINDS for name, rows in losses.items()}


@st.composite
def calls(draw: Callable[..., Any], names: Sequence[str] = tuple(DRAWN)) -> Call:
    name = draw(st.sampled_from(names))
    rows, make = DRAWN[name]
    source = Source(draw)
    options = source.reductions(name, rows)
    tensors, more = make(source, name)
    assume(name in SEQUENCES or common_size(tensors) <= 30 * MOST)
    wanted = {k for row in rows for k in row.differentiable if draw(st.booleans())}
    numbers = [t.is_floating_point() or t.is_complex() for t in tensors]
    return Call(
        name,
        tuple(tensors),
        options | more,
        tuple(k for k in sorted(wanted) if numbers[k]),
        source.seed,
    )


def common_size(tensors: Sequence[Tensor]) -> int:
    """Elements of the shape that they broadcast to."""
    try:
        return math.prod(torch.broadcast_shapes(*(t.shape for t in tensors)))
    except RuntimeError:
        return 0
