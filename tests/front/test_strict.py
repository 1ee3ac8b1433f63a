"""checks("strict"): each refusal with its message, and what must not be refused."""

# ruff: noqa: E501 - a row of the table is a line

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FLOATS, Case, name_of, parameters, same_bits
from torch import Generator, Tensor, tensor
from torch.testing._internal.two_tensor import TwoTensor

import fusedloss
from fusedloss import functional
from fusedloss.front import strict

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
NAN, INF = float("nan"), float("inf")

LOGITS = 3 * torch.sin(torch.arange(20.0)).reshape(5, 4)
P = LOGITS.softmax(1)
LOG_P = LOGITS.log_softmax(1)
Y = tensor([0, 3, 1, 2, 0])
T = torch.linspace(0, 1, 20).reshape(5, 4)


def planted(whole: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    return whole.index_put(tuple(map(tensor, at)), tensor(value, dtype=whole.dtype))


Row = tuple[str, tuple[Tensor, ...], dict[str, Any], str]
MSE, BCE, KL, CE, NLL = (
    "mse_loss",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "cross_entropy",
    "nll_loss",
)
BATCH = {"reduction": "batchmean"}
SPACE = LOGITS.reshape(1, 5, 4).movedim(2, 1)  # (1, 4, 5)

# fmt: off
REFUSED: list[Row] = [
    (MSE, (torch.ones(3, 1), torch.ones(3)), {}, r"input \[3, 1\] and target \[3\] would broadcast to \[3, 3\].*target\.reshape\(input\.shape\)"),
    (MSE, (torch.ones(3, 4), torch.ones(4)), {}, r"input \[3, 4\] and target \[4\] would broadcast to \[3, 4\].*expand"),
    (MSE, (LOGITS, planted(T, (1, 2), NAN)), {}, r"target\[1, 2\] = nan"),
    ("hinge_embedding_loss", (LOGITS, (LOGITS > 0).float()), {}, r"target\[0, 0\] = 0: labels are -1 and 1"),
    (KL, (LOG_P, P[:1]), BATCH, r"input \[5, 4\] and target \[1, 4\] would broadcast to \[5, 4\]"),
    (KL, (LOG_P, P), {"reduction": "mean"}, r"divides by all 20 elements.*'batchmean'"),
    (KL, (LOG_P, P), {"size_average": True}, r"'batchmean'"),
    (KL, (LOG_P[None], P[None]), BATCH, r"divides by 1, dimension 0 of \[1, 5, 4\], alone.*input\.flatten\(0, -2\)"),
    (KL, (LOG_P[:2, None, :, None].expand(2, 3, 4, 1), P[:2, None, :, None]), {"log_target": False, **BATCH}, r"would broadcast"),
    (KL, (LOG_P.reshape(5, 2, 2), P.reshape(5, 2, 2)), BATCH, r"divides by 5, dimension 0 of \[5, 2, 2\]"),
    (KL, (P, P), BATCH, r"input\[0, 0\] = 0\.\d+: log-probabilities are at most 0: these look like probabilities"),
    (KL, (LOGITS, P), BATCH, r"input\[0, 1\] = 2\.52\d+: log-probabilities are at most 0: pass log_softmax"),
    (KL, (LOG_P, planted(P, (4, 0), NAN)), BATCH, r"target\[4, 0\] = nan"),
    (KL, (LOG_P, planted(P, (4, 0), -0.25)), BATCH, r"target\[4, 0\] = -0\.25: probabilities are not negative"),
    (KL, (LOG_P, planted(P, (3, 0), 0.5)), BATCH, r"target sums to 1\.\d+ over dimension 1 at \[3\], not to 1"),
    (KL, (LOG_P, LOG_P), BATCH, r"target\[0, 0\] = -.*probabilities are not negative"),
    (KL, (LOG_P, P), {"log_target": True, **BATCH}, r"target\[0, 0\] = 0\.\d+: log-probabilities are at most 0"),
    (KL, (LOG_P, LOG_P - 1), {"log_target": True, **BATCH}, r"target sums to 0\.36\d+ over dimension 1 at \[0\]"),
    (BCE, (LOGITS, planted(T, (0, 3), 1.5)), {}, r"target\[0, 3\] = 1\.5: targets are probabilities in \[0, 1\]"),
    (BCE, (LOGITS, planted(T, (0, 3), -1.0)), {}, r"target\[0, 3\] = -1: .*labels -1 and 1"),
    (BCE, (LOGITS, planted(T, (2, 1), NAN)), {}, r"target\[2, 1\] = nan"),
    (BCE, (LOGITS.sigmoid(), T), {}, r"input looks like probabilities: all 20 elements lie in \[0\.\d+, 0\.95\d+\].*binary_cross_entropy"),
    (CE, (P, Y), {}, r"input looks like softmax outputs: all 5 rows .*\(input\[0, 0\] = 0\.\d+\)\. Pass the logits"),
    (CE, (P, P), {}, r"input looks like softmax outputs"),
    (CE, (P[0], Y[0]), {}, r"input looks like softmax outputs: all 1 rows"),
    ("dice_loss", (SPACE.softmax(1), Y[None]), {}, r"input looks like softmax outputs: all 5 rows"),
    ("dice_loss", (T, (T > 0.5).float()), {"activation": "sigmoid"}, r"input looks like probabilities: all 20 elements"),
    ("dice_focal", (SPACE.softmax(1), Y[None]), {}, r"input looks like softmax outputs: all 5 rows"),
    ("dice_cross_entropy", (LOGITS, torch.full((5,), -100)), {"reduction": "mean"}, r"all 5 targets are ignore_index"),
    (CE, (SPACE.softmax(1), Y[None]), {}, r"input looks like softmax outputs: all 5 rows"),
    (CE, (LOGITS, planted(P, (1, 1), NAN)), {}, r"target\[1, 1\] = nan"),
    (CE, (LOGITS, planted(P, (1, 1), -1.0)), {}, r"target\[1, 1\] = -1: probabilities are not negative"),
    (CE, (LOGITS, planted(P, (1, 1), 1.0)), {}, r"target sums to 1\.\d+ over dimension 1 at \[1\], not to 1"),
    (CE, (LOGITS[0], 2 * P[0]), {}, r"target sums to 2 over dimension 0, not to 1"),
    (CE, (SPACE, SPACE.softmax(2)), {}, r"target sums to .* over dimension 1 at \[0, 0\]"),
    (CE, (LOGITS, torch.full((5,), -100)), {}, r"all 5 targets are ignore_index = -100, and the mean over no row is NaN"),
    (CE, (LOGITS, torch.full((5,), 2, dtype=torch.uint8)), {"ignore_index": 2}, r"all 5 targets are ignore_index = 2"),
    (NLL, (P, Y), {}, r"input\[0, 0\] = 0\.\d+: log-probabilities are at most 0: these look like probabilities"),
    (NLL, (LOGITS, Y), {}, r"input\[0, 1\] = 2\.52\d+: log-probabilities are at most 0: pass log_softmax"),
    (NLL, (LOG_P, torch.full((5,), -100)), {}, r"all 5 targets are ignore_index = -100"),
]

ACCEPTED: list[Row] = [
    (MSE, (LOGITS, T), {}, "plain"),
    (MSE, (planted(LOGITS, (0, 0), NAN), T), {}, "NaN in the input, which shows by itself"),
    (KL, (LOG_P, P), BATCH, "plain"),
    (KL, (LOG_P, P), {"reduction": "sum"}, "sum"),
    (KL, (LOG_P, P), {"size_average": False}, "legacy sum"),
    (KL, (LOG_P.T, P.T), BATCH, "the classes in another dimension"),
    (KL, (LOG_P[:, None], P[:, None]), BATCH, "one row a batch"),
    (KL, (LOG_P[None, :, None], P[None, :, None]), {"reduction": "sum"}, "a sum of more dimensions"),
    (KL, (LOG_P[None], P[None]), {"reduction": "none"}, "unreduced"),
    (KL, (LOG_P[None, :0], P[None, :0]), BATCH, "no row"),
    (KL, (LOG_P, LOG_P), {"log_target": True, **BATCH}, "log_target"),
    (KL, (LOG_P[0, 0], P[0, 0]), BATCH, "one element"),
    (KL, (LOG_P[:0], P[:0]), BATCH, "empty"),
    (KL, (planted(LOG_P, (0, 0), 1e-4), P), BATCH, "rounding above 0"),
    (KL, (torch.full((2, 3), -INF), tensor([[1.0, 0, 0], [0, 1.0, 0]])), BATCH, "-inf"),
    (BCE, (LOGITS, T), {}, "plain"),
    (BCE, (torch.zeros(64), torch.ones(64)), {}, "a fresh layer's zeros"),
    (BCE, (torch.rand(8), torch.ones(8)), {}, "few logits within [0, 1]"),
    (BCE, (LOGITS[:0], T[:0]), {}, "empty"),
    (CE, (LOGITS, Y), {}, "plain"),
    (CE, (LOGITS, P), {}, "probabilities"),
    (CE, (planted(P, (4, 0), 0.9), Y), {}, "one row that is no distribution"),
    (CE, (torch.zeros(5, 4), Y), {}, "logits of 0"),
    (CE, (torch.ones(5, 1), torch.zeros(5, dtype=torch.long)), {}, "one class"),
    (CE, (LOGITS[:0], Y[:0]), {}, "no row"),
    ("dice_loss", (P, Y), {"activation": "none"}, "probabilities where these are asked for"),
    ("dice_loss", (P[:3], Y[:3]), {"activation": "sigmoid"}, "few elements"),
    (CE, (LOGITS, torch.full((5,), -100)), {"reduction": "sum"}, "all ignored in a sum, which is 0"),
    (CE, (LOGITS, torch.full((5,), -100)), {"reduction": "none"}, "all ignored, unreduced"),
    (CE, (LOGITS, tensor([-100, -100, 1, -100, -100])), {}, "one row left"),
    (CE, (SPACE, SPACE.softmax(1)), {}, "probabilities in space"),
    (CE, (LOGITS, tensor([[0.333, 0.333, 0.333, 0.0]] * 5)), {}, "three digits"),
    (NLL, (LOG_P, Y), {}, "plain"),
    (NLL, (LOG_P[0], Y[0]), {}, "one row"),
    (NLL, (planted(LOG_P, (1, 1), INF), planted(Y, (1,), -100)), {}, "inf in an ignored row"),
]
# fmt: on


def call(row: Row, face: Any = functional) -> Tensor:
    name, tensors, options, _ = row
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = getattr(face, name, None) or getattr(fusedloss, name)  # of ours alone
        return function(*tensors, **options)


def named(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[f"{r[0]}: {r[3][:40]}" for r in rows])


@named(REFUSED)
def test_refuses(row: Row) -> None:
    call(row, torch.nn.functional)  # PyTorch lets it pass
    unchecked = call(row)
    with fusedloss.checks("strict"), pytest.raises(ValueError) as caught:
        call(row)
    message = str(caught.value)
    assert message.startswith(f"{row[0]}: ") and re.search(row[3], message), message
    with fusedloss.checks("eager"):
        assert same_bits(call(row), unchecked)


@named(ACCEPTED)
def test_accepts(row: Row) -> None:
    expected = call(row)
    with fusedloss.checks("strict"):
        assert same_bits(call(row), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@parameters()
def test_examples_pass(case: Case, dtype: torch.dtype, generator: Generator) -> None:
    """In half types too, whose rounded probabilities sum to 1 but roughly."""
    for shape in filter(case.takes, ((7,), (64, 33), (16, 5, 3), (0, 5))):
        tensors, options = case.example(shape, dtype, generator)
        options["reduction"] = "sum"
        with fusedloss.checks("strict"):
            case.function(*tensors, **options)


def test_focal_losses_are_told_of_by_their_own_names() -> None:
    with fusedloss.checks("strict"):
        with pytest.raises(ValueError, match=r"softmax_focal_loss takes their softmax itself"):
            functional.softmax_focal_loss(P, Y)
        with pytest.raises(ValueError, match=r"all 20 elements .* Pass the logits \(checks"):
            functional.sigmoid_focal_loss(LOGITS.sigmoid(), T)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(
    "row", [r for r in REFUSED if "looks like" in r[3] or "sums" in r[3]], ids=str
)
def test_refuses_in_every_type(row: Row, dtype: torch.dtype) -> None:
    name, tensors, options, message = row
    typed = tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
    with fusedloss.checks("strict"), pytest.raises(ValueError, match=r"looks like|sums to"):
        call((name, typed, options, message))


def test_modules_refuse() -> None:
    with fusedloss.checks("strict"), pytest.raises(ValueError, match="softmax outputs"):
        fusedloss.nn.CrossEntropyLoss()(P, Y)


def test_usual_errors_come_first() -> None:
    with fusedloss.checks("strict"):
        with pytest.raises(RuntimeError, match="do not broadcast"):
            functional.mse_loss(torch.ones(3, 4), torch.ones(5))
        with pytest.raises(IndexError, match="out of range"):
            functional.nll_loss(LOG_P, Y + 3)


SKIPPED: dict[str, Callable[[], object]] = {
    "vmap": lambda: torch.func.vmap(functional.cross_entropy)(P, Y),
    "grad": lambda: torch.func.grad(functional.cross_entropy)(P, Y),
    "compile": lambda: torch.compile(functional.cross_entropy, backend="eager")(P, Y),
    "meta": lambda: functional.cross_entropy(P.to("meta"), Y.to("meta")),
    "subclass": lambda: functional.cross_entropy(TwoTensor(P, P), Y),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_where_there_is_nothing_to_read(name: str) -> None:
    with fusedloss.checks("strict"):
        SKIPPED[name]()


def test_off_costs_one_look() -> None:
    """What a call pays for the switch: here it only must not read a tensor."""
    looked: list[str] = []
    original, strict.check = strict.check, lambda *a, **k: looked.append(a[0])
    try:
        for row in REFUSED:
            call(row)
        assert not looked
        with fusedloss.checks("strict"):
            call(REFUSED[0])
        assert looked == [MSE]
    finally:
        strict.check = original


def test_page_lists_the_rules() -> None:
    section = PAGE.read_text().split("## Strict mode")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)[1:]
    assert rows == [(words, ", ".join(f"`{n}`" for n in names)) for words, names in strict.table()]


def test_every_rule_refuses_something() -> None:
    broken = set()
    for name, tensors, options, _ in REFUSED:
        settings = {k: v for k, v in options.items() if k in strict.Seen._fields}
        if name in (CE, NLL):
            settings.setdefault("reduction", "mean")
        seen = strict.Seen(name, *tensors, **settings)
        broken |= {rule for rule in strict.RULES[name] if rule(seen)}
    assert broken == {rule for rules in strict.RULES.values() for rule in rules}
