"""What runs under PyTorch without NaN runs here, with the exceptions that docs/compatibility.md lists."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sequences
import torch
from conftest import FLOATS
from torch import Tensor
from torch.nn import functional as theirs

from fusedloss import functional as ours
from fusedloss.front.definition import REGISTRY

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
EVERY = (*FLOATS * 3, *INTEGERS, torch.complex64)
SHAPES: list[tuple[int, ...]] = [
    *((), (0,), (1,), (4,), (3, 4), (3, 1), (1, 4), (0, 4), (3, 0)),
    *((2, 3, 4), (2, 1, 4), (2, 3, 0), (1, 3, 4), (2, 3, 2, 2), (2, 3, 1, 2), (2, 2, 3, 2, 2)),
]

Call = tuple[str, list[Tensor], dict[str, Any]]
EXCEPTIONS: dict[str, Callable[[Call], bool]] = {
    "a negative `label_smoothing` of `cross_entropy`": lambda call: (
        call[2].get("label_smoothing", 0) < 0
    ),
    "`p` of 0 or below in `triplet_margin_loss`": lambda call: call[2].get("p", 2) <= 0,
    "`mse_loss` of complex tensors, which takes a weight in PyTorch": lambda call: (
        call[0] == "mse_loss" and any(t.is_complex() for t in tensors_of(call))
    ),
    "`mse_loss` of integer tensors with an integer weight": lambda call: (
        call[0] == "mse_loss" and all(t.dtype in INTEGERS for t in tensors_of(call))
    ),
    "a complex class weight beside probabilities in `cross_entropy`": lambda call: (
        call[0] == "cross_entropy" and "weight" in call[2] and call[2]["weight"].is_complex()
    ),
    "a complex weight of `l1_loss` and `huber_loss`": lambda call: (
        call[0] in ("l1_loss", "huber_loss")
        and "weight" in call[2]
        and call[2]["weight"].is_complex()
    ),
    "complex tensors in `gaussian_nll_loss`": lambda call: (
        call[0] == "gaussian_nll_loss" and any(t.is_complex() for t in call[1])
    ),
    "an empty `input` beside wrong types in `multi_margin_loss` and `multilabel_margin_loss`": (
        lambda call: call[0].endswith("_margin_loss") and not call[1][0].numel()
    ),
    "a target or weight of more dimensions than the input in `multilabel_soft_margin_loss`, or a complex "
    "one": lambda call: (
        call[0] == "multilabel_soft_margin_loss"
        and any(t.dim() > call[1][0].dim() or t.is_complex() for t in tensors_of(call))
    ),
    "an empty `input` of integers in `cross_entropy`": lambda call: (
        call[0] == "cross_entropy" and call[1][0].dtype in INTEGERS and not call[1][0].numel()
    ),
}
DISTANCES = (
    None,
    torch.nn.PairwiseDistance(p=3, keepdim=True),
    lambda a, b: (a - b).abs().sum(-1),
    lambda a, b: 1 - torch.cosine_similarity(a, b, -1),
    lambda a, b: (a - b).abs().sum(),
)


def tensors_of(call: Call) -> list[Tensor]:
    return [*call[1], *(v for v in call[2].values() if isinstance(v, Tensor))]


class Draw:
    """Arguments of all kinds, most of them such as PyTorch takes."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def types(self, floating: float) -> tuple[torch.dtype, ...]:
        return FLOATS if self.chance(floating) else EVERY

    def tensor(
        self, shape: tuple[int, ...], types: tuple[torch.dtype, ...] = EVERY, low: float = 0.05
    ) -> Tensor:
        dtype = self.random.choice(types)
        if dtype in INTEGERS:
            return torch.randint(0, 2, shape, generator=self.generator).to(dtype)
        real = torch.complex64 if dtype.is_complex else torch.float64
        unit = torch.rand(shape, generator=self.generator, dtype=real)
        return (low + 0.9 * unit).to(dtype)

    def like(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that may go with another."""
        if self.chance(0.6):
            return shape
        if self.chance(0.4):
            return shape[1:]
        if self.chance(0.5):
            return tuple(1 if self.chance(0.5) else n for n in shape)
        return self.random.choice(SHAPES)

    def alike(self, tensors: list[Tensor], share: float) -> list[Tensor]:
        """Of one type, in a share of all cases."""
        first = tensors[0].dtype
        if self.chance(share) and (first.is_complex or not any(t.is_complex() for t in tensors)):
            return [t.to(first) for t in tensors]
        return tensors

    def call(self, loss: str) -> Call:
        shape = self.random.choice(SHAPES)
        options: dict[str, Any] = {"reduction": self.random.choice(["mean", "sum", "none"])}
        parameters = inspect.signature(getattr(torch.nn.functional, loss)).parameters
        if "reduce" in parameters:
            for legacy in ("size_average", "reduce"):
                if self.chance(0.05):
                    options[legacy] = self.chance(0.5)
        own = getattr(self, loss, None)  # of a loss that takes more than elements
        tensors = own(shape, options) if own else self.elements(shape, options, parameters)
        return loss, tensors, options

    def elements(
        self, shape: tuple[int, ...], options: dict[str, Any], parameters: Collection[str]
    ) -> list[Tensor]:
        if "weight" in parameters and self.chance(0.5):
            options["weight"] = self.tensor(self.like(shape))
        return [self.tensor(shape), self.tensor(self.like(shape))]

    def binary_cross_entropy(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        if self.chance(0.5):
            options["weight"] = self.tensor(self.like(shape))
        input, target = (
            self.tensor(shape, self.types(0.7)),
            self.tensor(self.like(shape), self.types(0.8)),
        )
        return self.alike([input, target], 0.6)

    def binary_cross_entropy_with_logits(
        self, shape: tuple[int, ...], options: dict[str, Any]
    ) -> list[Tensor]:
        if self.chance(0.5):
            options["pos_weight"] = self.tensor(self.like(shape))
        return self.binary_cross_entropy(shape, options)

    def gaussian_nll_loss(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        options["full"] = self.chance(0.4)
        var = shape[:-1] if self.chance(0.3) else self.like(shape)
        types = self.types(0.6)
        return [self.tensor(s, types) for s in (shape, self.like(shape), var)]

    def margin_ranking_loss(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        options["margin"] = self.random.choice([0, 0.3, 2, True])
        return [self.tensor(shape), *(self.tensor(self.like(shape)) for _ in range(2))]

    def soft_margin_loss(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        return [self.tensor(shape, self.types(0.8)), self.tensor(self.like(shape), INTEGERS)]

    def kl_div(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        options["log_target"] = self.chance(0.4)
        if self.chance(0.2):
            options["reduction"] = "batchmean"
        low = -2 if options["log_target"] else 0.05
        target = self.tensor(self.like(shape), self.types(0.8), low)
        return [self.tensor(shape, self.types(0.8), -2), target]

    def nll_loss(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        input = self.tensor(shape, self.types(0.8), -2)
        if self.chance(0.4):
            options["ignore_index"] = self.random.choice([0, 1, -1, -100, 5])
        if self.chance(0.4):
            wanted = (*shape[1:2], *shape[:1], 1)[:1]
            types = (input.dtype,) if self.chance(0.7) else EVERY
            options["weight"] = self.tensor(wanted if self.chance(0.8) else (1, *wanted), types)
        indices = shape[:1][: max(len(shape) - 1, 0)] + shape[2:]
        if self.chance(0.7):
            return [input, self.tensor(indices, INTEGERS)]
        return [input, self.tensor(self.like(shape), self.types(0.8))]

    def cross_entropy(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        if self.chance(0.5):
            options["label_smoothing"] = self.random.choice([0, 0.1, 1.0, 1, True, -0.2, 1.2])
        return self.nll_loss(shape, options)

    def ctc_loss(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        """Labels that are out of range end the process under PyTorch."""
        frames, n, classes = (self.random.choice(sizes) for sizes in ((1, 3, 6), (1, 2), (3, 4)))
        x = self.tensor((frames, n, classes), FLOATS[:2], -2)
        counts = torch.randint(3, (n,), generator=self.generator)
        most = int(counts.sum()) if self.chance(0.3) else 2
        targets = self.tensor((most,) if most < 2 or self.chance(0.3) else (n, most), self.types(0))
        if targets.dim() == 1:
            counts = torch.tensor([most, *[0] * (n - 1)])
        inputs = torch.randint(frames + 1, (n,), generator=self.generator)
        options["blank"] = self.random.choice([2, classes - 1, classes])  # no label
        options["zero_infinity"] = self.chance(0.5)
        lengths = [t.to(self.random.choice(INTEGERS[:-1])) for t in (inputs, counts)]
        return [x[:, 0] if n == 1 and self.chance(0.5) else x, targets, *lengths]

    def triplet_margin_loss(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        options["p"] = self.random.choice([1, 2, 2.0, 3, 0.5, float("inf"), 0, -1])
        options["eps"] = self.random.choice([1e-6, 0, 0.1, -1e-6])
        return self.triplet(shape, options)

    def triplet_margin_with_distance_loss(
        self, shape: tuple[int, ...], options: dict[str, Any]
    ) -> list[Tensor]:
        options["distance_function"] = self.random.choice(DISTANCES)
        return self.triplet(shape, options)

    def cosine_embedding_loss(
        self, shape: tuple[int, ...], options: dict[str, Any]
    ) -> list[Tensor]:
        shape = shape[:2] if self.chance(0.8) else shape
        options["margin"] = self.random.choice([0, 0.3, -0.5, True])
        # Products of short integers wrap around in PyTorch.
        types = tuple(t for t in self.types(0.6) if t not in (torch.int8, torch.uint8))
        first, second = (self.tensor(self.like(shape), types) for _ in "ab")
        signs = 2 * torch.randint(0, 2, shape[:1][: len(shape) - 1], generator=self.generator) - 1
        target = signs.to(self.random.choice(EVERY))
        return [first, second, target if self.chance(0.8) else self.tensor(self.like(shape[:1]))]

    def rows(self, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[int, ...]:
        """Of a loss of (N, C); PyTorch's result over no row is memory that nothing was written to."""
        if 0 in shape[:2]:
            options.clear()
            options["reduction"] = "none"
        return shape[:2]

    def multi_margin_loss(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        shape = self.rows(shape, options)
        options["p"] = self.random.choice([1, 2, 2.0, True])
        options["margin"] = self.random.choice([1.0, 0.5, 0, 3, -0.2])
        input = self.tensor(shape, self.types(0.9))
        if self.chance(0.4):
            types = (input.dtype,) if self.chance(0.8) else EVERY
            options["weight"] = self.tensor(shape[-1:], types).detach()
        return [input, self.tensor(self.like(shape[:-1]), INTEGERS)]

    def multilabel_margin_loss(
        self, shape: tuple[int, ...], options: dict[str, Any]
    ) -> list[Tensor]:
        shape = self.rows(shape, options)
        labels = self.tensor(self.like(shape) if self.chance(0.2) else shape, INTEGERS)
        return [self.tensor(shape, self.types(0.9)), labels.long() if self.chance(0.8) else labels]

    def triplet(self, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        options["margin"] = self.random.choice([1.0, 0.5, 2, True, 1e-3])
        options["swap"] = self.chance(0.4)
        # Differences of bytes wrap around in PyTorch.
        types = tuple(t for t in self.types(0.6) if t is not torch.uint8)
        tensors = [
            self.tensor(self.like(shape) if self.chance(0.3) else shape, types) for _ in "apn"
        ]
        return self.alike(tensors, 0.5)


def outcome(face: Any, call: Call) -> tuple[Tensor, list[Tensor | None]] | Exception:
    name, tensors, options = call
    inputs = [
        t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors
    ]
    try:
        value = sequences.function_of(face, name)(*inputs, **options)
        if value.requires_grad:
            (value.abs() if value.is_complex() else value).sum().backward()
        return value.detach(), [t.grad for t in inputs]
    except Exception as error:
        return error


def wraps_around(call: Call) -> bool:
    """PyTorch subtracts 1 from it in uint8, or takes its negative."""
    if call[0] in ("soft_margin_loss", "hinge_embedding_loss", "margin_ranking_loss"):
        return any(t.dtype is torch.uint8 for t in call[1])
    pos_weight = call[2].get("pos_weight")
    return pos_weight is not None and pos_weight.dtype is torch.uint8


LOSSES = sorted(
    {loss.name for loss in REGISTRY.values() if loss.kind != "heads"} & set(dir(theirs))
)


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_runs_under_torch_runs_here(loss: str, count: int) -> None:
    draw, ran = Draw(1), 0
    for _ in range(count):
        call = draw.call(loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = outcome(theirs, call)
            if isinstance(expected, Exception):
                continue
            value, grads = expected
            if any(t is not None and t.isnan().any() for t in (value, *grads)) or wraps_around(
                call
            ):
                continue
            found = outcome(ours, call)
        where = f"{[(t.dtype, list(t.shape)) for t in call[1]]} {call[2]}"
        if isinstance(found, Exception):
            assert any(excepted(call) for excepted in EXCEPTIONS.values()), f"{where}: {found!r}"
            continue
        ran += 1
        assert (found[0].dtype, found[0].shape) == (value.dtype, value.shape), where
        # Half types are rounded in other places here, which a power or a hinge may magnify.
        coarse = any(t.dtype in FLOATS[2:] for t in tensors_of(call))
        for a, e in zip((found[0], *found[1]), (value, *grads), strict=True):
            assert (a is None) == (e is None), where
            if a is not None and e is not None and not coarse:
                torch.testing.assert_close(
                    a, e, rtol=1e-3, atol=1e-4, msg=lambda m, w=where: f"{w}: {m}"
                )
    assert ran > count / 20


def test_every_exception_is_one() -> None:
    """PyTorch gives a number, we refuse, and the page says so."""
    section = PAGE.read_text().split("These are all the exceptions:")[1].split("\n\nUnder")[0]
    assert re.findall(r"^- (.+)$", section, re.MULTILINE) == list(EXCEPTIONS)
    x, ones = torch.rand(3, 4), torch.ones(3, 4, dtype=torch.int64)
    index, empty = torch.tensor([0, 1, 2]), torch.ones(0, 4, dtype=torch.int64)
    calls: list[Call] = [
        ("cross_entropy", [x, index], {"label_smoothing": -0.1}),
        ("triplet_margin_loss", [x, x + 1, x - 1], {"p": -1}),
        ("mse_loss", [x.to(torch.complex64), x], {"weight": x}),
        ("mse_loss", [ones, ones], {"weight": ones}),
        ("cross_entropy", [x, x], {"weight": x[0].to(torch.complex64)}),
        ("huber_loss", [x, x + 1], {"weight": x.to(torch.complex64)}),
        ("gaussian_nll_loss", [x.to(torch.complex64), x, x + 1], {"reduction": "none"}),
        ("multi_margin_loss", [empty, index[:0]], {"reduction": "sum"}),
        ("multilabel_soft_margin_loss", [x, x], {"weight": torch.ones(2, 3, 4)}),
        ("cross_entropy", [empty, x[:0]], {"reduction": "sum"}),
    ]
    for call, excepted in zip(calls, EXCEPTIONS.values(), strict=True):
        assert excepted(call)
        assert isinstance(outcome(theirs, call), tuple)
        assert isinstance(outcome(ours, call), Exception)
