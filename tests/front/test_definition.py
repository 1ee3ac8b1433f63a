"""A definition makes a function and a module; one that cannot be says where, why and what to do."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedloss
from fusedloss import nn
from fusedloss.front.definition import REGISTRY
from fusedloss.front.loss import FUNCTIONS, Malformed, loss
from fusedloss.front.modules import MODULES
from fusedloss.front.operands import of_input
from fusedloss.front.pointwise import Elements
from fusedloss.front.settings import positive

LADDER = Elements(of_input("huber_cpu"))


def chooses_by_another_name(delta):
    """A formula."""


def chooses_by_a_tensor(full):
    """A formula."""


def says_nothing(delta):
    return None


def of_no_name(delta):
    """A formula."""


def named(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    body.__name__ = name
    return body


@pytest.mark.parametrize(
    ("body", "settings", "words"),
    [
        (
            named("smooth_l1_loss", chooses_by_another_name),
            {},
            "delta is no parameter of PyTorch's smooth_l1_loss: give it a default, as an extension",
        ),
        (
            named("gaussian_nll_loss", chooses_by_a_tensor),
            {"full": positive, "eps": positive},
            "it takes no eps: let it choose by eps, or drop the word",
        ),
        (
            named("huber_loss", says_nothing),
            {},
            "it has no docstring: write its formula and its arguments there",
        ),
        (
            named("no_such_loss", of_no_name),
            {"delta": positive},
            "torch.nn.functional has no no_such_loss: name it as PyTorch does, or write its whole signature",
        ),
    ],
)
def test_malformed(body: Callable[..., Any], settings: dict[str, Any], words: str) -> None:
    before = dict(REGISTRY), dict(FUNCTIONS), dict(MODULES)
    with pytest.raises(Malformed) as caught:
        loss("HuberLoss", LADDER, **settings)(body)
    line = body.__code__.co_firstlineno
    assert str(caught.value) == f"{__file__}:{line}: {body.__name__}: {words}"
    assert before == (REGISTRY, FUNCTIONS, MODULES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_found_where_it_is_public(name: str) -> None:
    function = FUNCTIONS[name]
    assert function is getattr(fusedloss, name) is getattr(fusedloss.functional, name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert name in inspect.getsource(function)  # tracebacks show it
    assert list(function.__annotations__) == [*inspect.signature(function).parameters, "return"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_tells_of_every_argument_and_error(name: str) -> None:
    function = FUNCTIONS[name]
    doc = inspect.getdoc(function) or ""
    described = re.findall(r"^    (\w+): ", doc.split("Returns:")[0], re.MULTILINE)
    assert described == list(inspect.signature(function).parameters)
    assert ":math:`" in doc or ".. math::" in doc
    assert "\nRaises:\n" in doc
    assert (f"torch.nn.functional.{name}" in doc) is hasattr(torch.nn.functional, name)
    assert max(map(len, doc.splitlines())) <= 112


@pytest.mark.parametrize("name", MODULES)
def test_module_is_public(name: str) -> None:
    assert MODULES[name] is getattr(nn, name) is getattr(fusedloss, name)
    assert issubclass(MODULES[name], getattr(torch.nn, name, torch.nn.Module))


@pytest.mark.parametrize("name", sorted(MODULES.keys() - set(dir(torch.nn))))
def test_module_without_a_namesake(name: str) -> None:
    """It takes the settings of its function, passes them all, and keeps tensors as buffers."""
    module = MODULES[name]()
    (function,) = [
        f for f in FUNCTIONS.values() if f".{f.__name__}`" in (MODULES[name].__doc__ or "")
    ]
    settings = inspect.signature(MODULES[name]).parameters
    operands = inspect.signature(module.forward).parameters
    of_call = [n for n, p in operands.items() if p.default is None]  # such as a weight of the batch
    needed = [n for n in operands if n not in of_call]
    assert [*needed, *settings, *of_call] == list(inspect.signature(function).parameters)
    row = next(row for row in REGISTRY.values() if row.function is function)
    generator = torch.Generator().manual_seed(0)
    for make in row.options.values():
        tensors = row.example((4, 3), torch.float64, generator)
        options = make(tensors, generator)
        options["reduction"] = "sum"
        module = MODULES[name](**options)
        held = {n for n, v in options.items() if isinstance(v, torch.Tensor)}
        assert held == {n for n, b in module.named_buffers() if b is not None}
        twin = pickle.loads(pickle.dumps(module))
        assert torch.equal(twin(*tensors), function(*tensors, **options))
        shown = repr(module)
        assert all(f"{n}={v!r}" in shown for n, v in options.items() if n not in held)


def test_every_loss_is_in_the_registry() -> None:
    assert {row.name for row in REGISTRY.values()} == set(FUNCTIONS)
