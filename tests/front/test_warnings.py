"""Warnings: PyTorch's own words first, at the place of the user's call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss
from fusedloss import functional, nn

X, T = torch.full((3, 4), -1.0), torch.full((3, 4), 0.5)
REASONS: dict[str, tuple[str, tuple[Tensor, Tensor], dict[str, Any]]] = {
    "shapes": ("mse_loss", (X, T[0]), {}),
    "mean of kl_div": ("kl_div", (X, T), {"reduction": "mean"}),
    "size_average": ("cross_entropy", (X, T), {"size_average": True}),
    "reduce": ("binary_cross_entropy", (T, T), {"reduce": False}),
    "elementwise_mean": (
        "nll_loss",
        (X, torch.tensor([0, 1, 2])),
        {"reduction": "elementwise_mean"},
    ),
}
MODULES = {"mse_loss": "MSELoss", "kl_div": "KLDivLoss", "nll_loss": "NLLLoss"}


class Users(torch.nn.Module):
    """A module of the user's, which calls a function."""

    def __init__(self, function: Callable[..., Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.call = lambda *tensors: function(*tensors, **options)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


def doors() -> Iterator[Any]:
    for reason, (function, tensors, options) in REASONS.items():
        for face, functions, modules in (
            ("ours", functional, nn),
            ("patched", torch.nn.functional, torch.nn),
        ):
            call = getattr(functions, function)
            yield pytest.param(face, call, tensors, options, id=f"{reason}-{face}-function")
            if function in MODULES:
                module = getattr(modules, MODULES[function])(**options)
                yield pytest.param(face, module, tensors, {}, id=f"{reason}-{face}-module")


def first(door: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: Any) -> Tensor:
    return door(*tensors, **options)


def second(door: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: Any) -> Tensor:
    return door(*tensors, **options)


@pytest.mark.parametrize(("face", "door", "tensors", "options"), list(doors()))
def test_two_callers_get_two_warnings_at_their_places(
    face: str, door: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    callers = (first, second)
    with (
        fusedloss.patched() if face == "patched" else nullcontext(),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("default")
        for _ in range(2):
            for caller in callers:
                caller(door, tensors, options)
    places = [(w.filename, w.lineno) for w in caught]
    assert places == [(__file__, c.__code__.co_firstlineno + 1) for c in callers]


def test_the_place_is_in_the_code_of_a_users_module_or_transform() -> None:
    model = Users(functional.mse_loss, {})
    line = Users.__init__.__code__.co_firstlineno + 2
    mapped = torch.func.vmap(nn.MSELoss())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(X, T[0])
        mapped(X[None], T[None, 0])
    assert [(w.filename, w.lineno) for w in caught] == [
        (__file__, line),
        (
            __file__,
            test_the_place_is_in_the_code_of_a_users_module_or_transform.__code__.co_firstlineno
            + 7,
        ),
    ]


class Opaque(Tensor):
    """As DTensor: a subclass that PyTorch's functions take for plain, and patched ones do not."""

    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("reason", REASONS)
def test_the_place_where_patched_functions_are_torchs_own(reason: str) -> None:
    function, tensors, options = REASONS[reason]
    theirs = getattr(torch.nn.functional, function)
    opaque = tuple(t.as_subclass(Opaque) for t in tensors)
    places = []
    for face in (nullcontext, fusedloss.patched):
        with face(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first(theirs, opaque, options)
            places.append([(w.filename, w.lineno, str(w.message)) for w in caught])
    assert places[0] == places[1] != []


def messages(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("reason", REASONS)
def test_torchs_words_come_first_and_whole(reason: str) -> None:
    function, tensors, options = REASONS[reason]
    ours, theirs = getattr(functional, function), getattr(torch.nn.functional, function)
    (found,) = messages(lambda: ours(*tensors, **options))
    (expected,) = messages(lambda: theirs(*tensors, **options))
    assert found.startswith(expected)
    assert found == expected or f" {function}: " in found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=expected[:20].replace("(", r"\("))
        ours(*tensors, **options)
