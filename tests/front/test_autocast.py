"""All combinations of types, under autocast and not: PyTorch's result where it has one, else its exception."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from conftest import FLOATS, HALVES, Options, Outcome, Tensors, formula_path, name_of, run
from torch import tensor
from torch.nn import functional as theirs

from fusedloss import functional as ours

INTEGERS = (torch.int64, torch.uint8, torch.bool)
AUTOCAST = {"off": None, **{name_of(half): half for half in HALVES}}
LOSSES = (
    "mse_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "cross_entropy",
    "nll_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
)

OF_2_13 = torch.__version__.startswith("2.13.")
X = torch.linspace(0.1, 0.9, 24, dtype=torch.float64).reshape(6, 4)
T = X.flip(0, 1)
EACH = torch.linspace(0.5, 1.5, 24, dtype=torch.float64).reshape(6, 4)  # a weight of each element
OF_CLASS = EACH[0]
INDEX = tensor([0, 1, 2, 3, 1, 1])

Call = tuple[Tensors, Options]


def calls(loss: str) -> Iterator[Call]:
    """Of all types of input, target and weight."""
    if loss.startswith("triplet"):
        for a, b, c in itertools.product(FLOATS, repeat=3):
            yield (X.to(a), T.to(b), (X * T).to(c)), {}
        return
    for x, t in itertools.product((*FLOATS, torch.int64), (*FLOATS, *INTEGERS)):
        yield from of_types(loss, x, t)


def of_types(loss: str, x: torch.dtype, t: torch.dtype) -> Iterator[Call]:
    indices = INDEX.to(t)
    for w in (None, *FLOATS):
        weight = {} if w is None else {"weight": OF_CLASS.to(w)}
        if loss == "mse_loss":
            yield (X.to(x), T.to(t)), {} if w is None else {"weight": EACH.to(w)}
        elif loss == "kl_div" and w is None:
            log_p = X.log_softmax(1).to(x)
            yield (log_p, T.to(t)), {"reduction": "sum"}
            yield (log_p, T.to(t)), {"reduction": "batchmean", "log_target": True}
        elif loss == "binary_cross_entropy":
            yield (X.to(x), T.to(t)), weight
        elif loss == "binary_cross_entropy_with_logits":
            yield (X.to(x), T.to(t)), weight
            if w is not None:
                yield (X.to(x), T.to(t)), {"pos_weight": weight["weight"]}
                yield (X.to(x), T.to(t)), {**weight, "pos_weight": EACH[1].to(t)}
        elif loss == "nll_loss":
            yield (X.log_softmax(1).to(x), indices), weight
        elif loss == "cross_entropy":
            yield (X.to(x), T.to(t) if t.is_floating_point else indices), weight
            # PyTorch cannot take smoothing beside bytes.
            smoothed = torch.int64 if t is torch.uint8 else t
            yield (
                (X.to(x), T.to(smoothed) if t.is_floating_point else INDEX.to(smoothed)),
                {**weight, "label_smoothing": 0.1},
            )


def outcome(face: Any, loss: str, call: Call) -> Outcome | Exception:
    tensors, options = call
    wanted = [k for k, t in enumerate(tensors) if t.is_floating_point()]
    if loss == "cross_entropy":
        wanted = wanted[:1]
    try:
        return run(getattr(face, loss), tensors, options, wanted)
    except Exception as error:
        return error


def escapes(loss: str, options: Options) -> bool:
    """Whether PyTorch's loss is made of operations that autocast leaves alone, so that it gives a half type."""
    return loss == "triplet_margin_with_distance_loss" or (
        loss == "mse_loss" and "weight" in options
    )


@pytest.mark.parametrize("path", [nullcontext, formula_path], ids=["kernel", "formula"])
@pytest.mark.parametrize("half", AUTOCAST)
@pytest.mark.parametrize("loss", LOSSES)
def test_types_are_those_of_torch(loss: str, half: str, path: Any) -> None:
    ran = 0
    for call in calls(loss):
        tensors, options = call
        types = [t.dtype for t in tensors], {k: getattr(v, "dtype", v) for k, v in options.items()}
        autocast = AUTOCAST[half]
        where: AbstractContextManager[Any] = (
            torch.autocast("cpu", autocast) if autocast else nullcontext()
        )
        with where:
            expected = outcome(theirs, loss, call)
            with path():
                found = outcome(ours, loss, call)
        if isinstance(expected, Exception):
            if torch.bool in types[0] and isinstance(found, Outcome):
                continue  # which counts as 0 and 1 here
            # Of two faults another torch names the other, and a NotImplementedError is a RuntimeError.
            kinds = (type(expected),) if OF_2_13 else type(expected).__mro__
            assert type(found) in kinds, f"{types}: {expected} / {found}"
            continue
        assert isinstance(found, Outcome), f"{types}: {found}"
        ran += 1
        for (name, a), (_, e) in zip(found.named(), expected.named(), strict=True):
            dtype = e.dtype
            if autocast and name == "value" and escapes(loss, options):
                dtype = torch.promote_types(dtype, torch.float32)
            assert a.dtype is dtype, f"{types} {name}: {a.dtype}, not {dtype}"
            assert torch.allclose(a.double(), e.double(), rtol=2e-2, atol=1e-2), f"{types} {name}"
    assert ran > 15
