"""`fusedloss.patch()` beside others who replace functions of torch.nn.functional."""

from __future__ import annotations

import functools
import itertools
import re
import sys
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F  # noqa: N812
from elsewhere import run_python
from patching import _restored, counted, example, in_place, module  # noqa: F401
from torch import Generator, Tensor

# Bound before any patch, as in a library that was imported earlier.
from torch.nn import CrossEntropyLoss
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import fusedloss


def liger_cross_entropy(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Tensor:
    return input.sum()


def wrapper_of(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    return wrapper


QUALIFIED = "wrapper_of.<locals>." if sys.version_info >= (3, 11) else ""
STAND_INS = {
    "function": (lambda _: liger_cross_entropy, f"{__name__}.liger_cross_entropy"),
    "wrapper": (wrapper_of, f"{__name__}.{QUALIFIED}wrapper"),
    "partial": (
        lambda f: functools.partial(f, label_smoothing=0.1),
        "a partial of torch.nn.functional.cross_entropy",
    ),
    "mock": (lambda _: unittest.mock.MagicMock(), "unittest.mock.MagicMock"),
    "class": (lambda _: CrossEntropyLoss, "torch.nn.modules.loss.CrossEntropyLoss"),
}


ORDERS = list(itertools.permutations(["patch", "assign", "unpatch", "put back"]))


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
@pytest.mark.parametrize("kind", STAND_INS)
def test_what_another_library_assigns_stays(
    kind: str, order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    x, target = example(generator)
    make, holder = STAND_INS[kind]
    stand_in = make(cross_entropy)
    code = getattr(stand_in, "__code__", None)
    patched = assigned = False
    for step in order:
        if step == "assign":
            monkeypatch.setattr(F, "cross_entropy", stand_in)
            assigned = True
        elif step == "put back":
            monkeypatch.undo()
            assigned = False
        elif step == "unpatch":
            fusedloss.unpatch()
            patched = False
        elif assigned:
            named = re.escape(f" cross_entropy ({holder})")
            with pytest.warns(UserWarning, match=f"{named}$") as told:
                fusedloss.patch()
            assert len(told) == 1 and told[0].filename == __file__
            patched = True
        else:
            fusedloss.patch()
            patched = True
        assert F.cross_entropy is (stand_in if assigned else cross_entropy)
        assert getattr(stand_in, "__code__", None) is code
        assert in_place() == {patched}
        calls = counted(lambda: cross_entropy(x, target))[1]
        assert calls == ({("cross_entropy", "kernel"): 1} if patched else {})
    assert "__prepare_scriptable__" not in vars(stand_in) or kind == "mock"


ASSIGNED_BEFORE_IMPORT = """
import functools, unittest.mock, warnings
import torch
import torch.nn.functional as F
def liger(input, target): return "liger"
def wrapper_of(f):
    @functools.wraps(f)
    def wrapper(*args, **options): return "apex", f(*args, **options)
    return wrapper
own = {name: getattr(F, name) for name in ("cross_entropy", "nll_loss", "mse_loss", "kl_div")}
code = {name: f.__code__ for name, f in own.items()}
F.cross_entropy = liger
F.nll_loss = wrapper_of(F.nll_loss)
F.mse_loss = functools.partial(F.mse_loss, reduction="sum")
F.kl_div = unittest.mock.MagicMock(return_value="mock")
torch.nn.CrossEntropyLoss = functools.partial(torch.nn.CrossEntropyLoss, label_smoothing=0.1)
foreign = {name: getattr(F, name) for name in own}
codes = {name: getattr(f, "__code__", None) for name, f in foreign.items()}

import fusedloss
from fusedloss.core import trace
x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
assert issubclass(fusedloss.nn.CrossEntropyLoss, torch.nn.modules.loss.CrossEntropyLoss)
assert fusedloss.nn.CrossEntropyLoss()(x, y) > 1
for _ in range(2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fusedloss.patch()
    (told,) = caught
    assert told.filename == "<string>", told
    for words in ("cross_entropy (__main__.liger)", "nll_loss (__main__.",
                  "mse_loss (a partial of torch.nn.functional.mse_loss)",
                  "kl_div (unittest.mock.MagicMock)"):
        assert words in str(told.message), told
    before = trace.calls()
    assert F.cross_entropy(x, y) == F.cross_entropy(input=x, target=y) == "liger"
    assert F.nll_loss(x, y) == ("apex", -1)
    assert F.mse_loss(x, x + 1) == 6
    assert F.kl_div(x, x) == "mock"
    assert torch.nn.modules.loss.CrossEntropyLoss.forward.__globals__["F"] is F
    assert F.binary_cross_entropy(x, x) == 0
    assert trace.calls() - before == {("binary_cross_entropy", "kernel"): 1}
    fusedloss.unpatch()
    assert all(getattr(F, name) is f for name, f in foreign.items())
    assert all(getattr(f, "__code__", None) is codes[name] for name, f in foreign.items() if name != "kl_div")
    assert all(f.__code__ is code[name] and not vars(f) for name, f in own.items())
"""


def test_what_another_library_assigned_before_the_import_stays() -> None:
    done = run_python(ASSIGNED_BEFORE_IMPORT)
    assert done.returncode == 0, done.stderr


def test_nothing_is_patched_where_the_warning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "mse_loss", liger_cross_entropy)
    for door in (fusedloss.patch, lambda: fusedloss.patched().__enter__()):
        with pytest.raises(UserWarning, match="mse_loss"):  # the suite's filter raises it
            door()
        assert in_place() == {False}


def test_code_that_another_puts_into_a_function_stays(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, target = example(generator)
    code = cross_entropy.__code__
    foreign = (lambda logits, target, *args, **options: "foreign").__code__
    fusedloss.patch()
    ours = cross_entropy.__code__
    cross_entropy.__code__ = foreign
    fusedloss.unpatch()
    assert cross_entropy(x, target) == "foreign"
    with pytest.warns(
        UserWarning, match=r"cross_entropy \(with code from .*test_patch_beside_others.py\)"
    ):
        fusedloss.patch()
    assert cross_entropy(x, target) == "foreign"
    fusedloss.unpatch()
    cross_entropy.__code__ = ours  # as they found it, whereas nothing is patched any more
    value, calls = counted(lambda: cross_entropy(x, target))
    assert not calls
    fusedloss.unpatch()
    assert cross_entropy.__code__ is code
    assert_close(value, cross_entropy(x, target))
