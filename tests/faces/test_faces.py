"""The two faces, `fusedloss.nn` and `fusedloss.functional`, beside their namesakes in torch."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sequences
import torch
from conftest import (
    CASES,
    Case,
    assert_same_bits,
    each_dtype,
    parameters,
    parameters_reduced,
    run,
)
from elsewhere import run_python
from torch import Generator, Tensor

import fusedloss
from fusedloss import functional, nn
from fusedloss.core import trace
from fusedloss.front.definition import REGISTRY

NAMES = {loss.name for loss in REGISTRY.values()}
LOSSES = {loss.name: loss.module for loss in REGISTRY.values() if loss.module}
MODULES = sorted(LOSSES.values())
# Those of a linear head that this torch has, too.
OURS = NAMES & set(dir(torch.nn.functional))
LEGACY = [
    (a, r) for a in (None, True, False) for r in (None, True, False) if (a, r) != (None, None)
]


def test_the_faces_have_every_loss_of_the_registry() -> None:
    assert set(fusedloss.losses.__all__) == NAMES
    assert {*NAMES, *LOSSES.values(), "nn", "functional", "explain"} <= set(fusedloss.__all__)
    assert all(getattr(fusedloss, name) is getattr(functional, name) for name in NAMES)
    assert all(getattr(fusedloss, name) is getattr(nn, name) for name in MODULES)
    assert not set(fusedloss.__all__) - set(dir(fusedloss))


@pytest.mark.parametrize(
    ("ours", "theirs", "own"),
    [
        pytest.param(nn, torch.nn, {*nn.OWN} & {*dir(torch.nn)}, id="nn"),
        pytest.param(functional, torch.nn.functional, OURS, id="functional"),
    ],
)
def test_face_serves_all_of_torch(ours: Any, theirs: Any, own: set[str]) -> None:
    names = [name for name in dir(theirs) if not name.startswith("__")]
    assert set(names) <= set(dir(ours))
    for name in set(names) - own - {"annotations"}:
        if getattr(ours, name) is not getattr(theirs, name):
            assert not isinstance(getattr(theirs, name), type(torch)), name
            pytest.fail(f"{name} is not torch's")
    for name in own:
        assert getattr(ours, name) is not getattr(theirs, name), name


@pytest.mark.parametrize("face", [nn, functional])
def test_unknown_name(face: Any) -> None:
    with pytest.raises(AttributeError, match=rf"'{face.__name__}' has no attribute 'NoSuchLoss'"):
        face.NoSuchLoss  # noqa: B018


# The submodules

FORMS = [
    "import {0}.functional as got",
    "from {0} import functional as got",
    "from {0}.functional import one_hot as got",
    "from {0}.functional import cross_entropy as got",
    "from {0}.parameter import Parameter as got",
    "import {0}.parameter as got",
    "from {0}.utils.rnn import pack_padded_sequence as got",
    "import {0}.utils.rnn; got = {0}.utils.rnn",
    "import {0}.utils.parametrizations as got",
    "import {0}.utils.weight_norm; got = {0}.utils.weight_norm",
    "from {0}.utils import weight_norm as got",
    "from {0}.utils.weight_norm import WeightNorm as got",
    "from {0}.modules import Linear as got",
    "from {0}.modules.linear import Linear as got",
    "from {0}.modules.loss import MSELoss as got",
    "from {0}.modules import *; got = Linear",
    "from {0} import *; got = Linear",
    "from {0} import *; got = utils",
    "from {0} import MSELoss as got",
    "from {0} import init as got",
    "from {0}.init import *; got = xavier_uniform_",
    "from {0} import Module as got",
    "import importlib; got = importlib.import_module('.rnn', '{0}.utils')",
    "import importlib; got = importlib.reload(importlib.import_module('{0}.common_types'))",
    "import importlib.util; got = importlib.util.find_spec('{0}.utils.stateless').origin",
    "import importlib.util; got = importlib.util.find_spec('{0}.utils.no_such')",
    "import {0}.no_such",
    "import {0}.functional.no_such",
    "from {0}.utils import no_such",
    "from {0} import no_such",
]


def outcome(statement: str, package: str) -> Any:
    """What an import binds, or its exception, as if the package were PyTorch's."""
    names: dict[str, Any] = {}
    try:
        exec(statement.format(package), names)
    except ImportError as error:
        words = str(error).split("(")[0]
        return type(error), words.replace("fusedloss", "torch")
    return names["got"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_import(form: str) -> None:
    found, expected = outcome(form, "fusedloss.nn"), outcome(form, "torch.nn")
    own = {
        torch.nn.functional: functional,
        torch.nn.functional.cross_entropy: functional.cross_entropy,
    }
    if form == "from {0} import MSELoss as got":
        own[torch.nn.MSELoss] = nn.MSELoss
    expected = own.get(expected, expected)
    assert found is expected or found == expected


def star(package: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(f"from {package} import *", names)
    del names["__builtins__"]
    return names


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(nn, torch.nn), (functional, torch.nn.functional)],
    ids=["nn", "functional"],
)
def test_star_import_takes_every_name(ours: Any, theirs: Any) -> None:
    found, expected = star(ours.__name__), star(theirs.__name__)
    own = set(nn.OWN if ours is nn else fusedloss.losses.__all__)
    assert found.keys() == expected.keys() | own
    for name, value in found.items():
        assert value is getattr(ours if name in own else theirs, name)
        assert name not in own or value is not expected.get(name)


ALL_OF_TORCH_NN = """
import contextlib, importlib.util, json, pkgutil, sys, warnings
import torch
warnings.simplefilter("ignore")
package, where = sys.argv[1:]
__import__(package)
for _, name, _ in pkgutil.walk_packages(torch.nn.__path__, "torch.nn."):
    name = package + name.removeprefix("torch.nn")
    with contextlib.suppress(ImportError):
        assert importlib.util.find_spec(name)
        __import__(name)
for name, module in list(sys.modules.items()):
    if name.startswith("fusedloss.nn.") and name != "fusedloss.nn.functional":
        assert module is sys.modules[name.replace("fusedloss", "torch")], name
seen = {
    name: [module.__name__, module.__spec__.name, module.__loader__.name, module.__package__]
    + sorted(f"{n} {type(v).__name__} {getattr(v, '__name__', '')}" for n, v in vars(module).items())
    for name, module in sys.modules.items() if name.startswith("torch.nn")
}
json.dump(seen, open(where, "w"))
"""


@pytest.mark.slow
def test_every_submodule_is_that_of_torch(tmp_path: Path) -> None:
    """And no import through us changes a name, a spec or an attribute there."""
    for package in ("torch.nn", "fusedloss.nn"):
        done = run_python(ALL_OF_TORCH_NN, package, str(tmp_path / package))
        assert done.returncode == 0, done.stderr
    expected, found = (json.loads((tmp_path / p).read_text()) for p in ("torch.nn", "fusedloss.nn"))
    assert len(expected) > 100
    assert {n: v for n, v in found.items() if v != expected[n]} == {}
    assert found.keys() == expected.keys()


def shape_of(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def assert_extends(ours: Any, theirs: Any) -> None:
    """The same parameters, and after them only keywords."""
    mine, given = shape_of(inspect.signature(ours)), shape_of(inspect.signature(theirs))
    assert mine[: len(given)] == given
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in mine[len(given) :])


@pytest.mark.parametrize("name", sorted(OURS))
def test_function_signature(name: str) -> None:
    ours, theirs = getattr(functional, name), getattr(torch.nn.functional, name)
    assert_extends(ours, theirs)
    assert ours.__doc__ and theirs.__name__ in ours.__doc__


@pytest.mark.parametrize("name", MODULES)
def test_module_class(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__ and ours.__module__ == "fusedloss.nn"
    assert_extends(ours, theirs)
    tensors = inspect.signature(theirs.forward).parameters
    given = inspect.signature(ours.forward).parameters
    assert list(given)[: len(tensors)] == list(tensors)
    added = list(given.values())[len(tensors) :]
    assert all(p.default is None for p in added)  # TorchScript has no keyword-only ones


def has_module(case: Case) -> bool:
    """Whether PyTorch has one, whose constructor takes the options."""
    theirs = getattr(torch.nn, case.loss.module or "-", None)
    options = case.example((3, 2), torch.float32, Generator())[1]
    return theirs is not None and options.keys() <= inspect.signature(theirs).parameters.keys()


def modules(
    case: Case, reduction: str, generator: Generator
) -> tuple[torch.nn.Module, torch.nn.Module, tuple[Tensor, ...]]:
    """Our module and PyTorch's with the same settings, and tensors to call them with."""
    tensors, options = case.example((5, 4), torch.float64, generator)
    name = case.loss.module
    ours = getattr(nn, name)(**options, reduction=reduction)
    theirs = getattr(torch.nn, name)(**options, reduction=reduction)
    return ours, theirs, tensors


@parameters_reduced(has_module)
def test_module_gives_what_its_function_and_torch_give(
    case: Case, reduction: str, generator: Generator
) -> None:
    ours, theirs, tensors = modules(case, reduction, generator)
    options = {k: getattr(ours, k) for k in case.loss.options[case.option](tensors, generator)}
    wanted = case.loss.differentiable
    actual = run(ours, tensors, {}, wanted)
    assert_same_bits(
        actual, run(case.loss.function, tensors, {**options, "reduction": reduction}, wanted)
    )
    ours, theirs = (sequences.projected(case.loss.name, each) for each in (ours, theirs))
    actual, expected = (run(each, tensors, {}, wanted) for each in (ours, theirs))
    for (_, a), (_, e) in zip(actual.named(), expected.named(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@parameters(has_module)
def test_module_looks_like_its_namesake(case: Case, generator: Generator) -> None:
    ours, theirs, _ = modules(case, "sum", generator)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert {n: type(v) for n, v in vars(ours).items()} == {
        n: type(v) for n, v in vars(theirs).items()
    }


@parameters(lambda case: has_module(case) and case.option != "lambda, swap")
def test_module_survives_state_dict_pickle_and_copy(case: Case, generator: Generator) -> None:
    ours, theirs, tensors = modules(case, "sum", generator)
    expected = run(ours, tensors, {}, case.loss.differentiable)
    blank, blank_theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    for module in (blank, blank_theirs):
        for buffer in module.buffers():
            buffer.zero_()
    blank.load_state_dict(theirs.state_dict())
    blank_theirs.load_state_dict(ours.state_dict())
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, blank_theirs.get_buffer(name))
    for twin in (blank, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert_same_bits(run(twin, tensors, {}, case.loss.differentiable), expected)


def recorded(call: Callable[[], Tensor]) -> tuple[Tensor, list[tuple[type, str]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call()
    return value, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize(("size_average", "reduce"), LEGACY)
@pytest.mark.parametrize(
    "name", [n for n in LOSSES if "reduce" in inspect.signature(getattr(functional, n)).parameters]
)
def test_legacy_arguments(
    name: str, size_average: bool | None, reduce: bool | None, generator: Generator
) -> None:
    case = next(c for c in CASES if c.loss.name == name)
    tensors, options = case.example((5, 4), torch.float64, generator)
    options |= {"size_average": size_average, "reduce": reduce}
    module = case.loss.module
    doors = [
        (getattr(functional, name), getattr(torch.nn.functional, name), options),
        (
            lambda *t: getattr(nn, module)(size_average=size_average, reduce=reduce)(*t),
            lambda *t: getattr(torch.nn, module)(size_average=size_average, reduce=reduce)(*t),
            {},
        ),
    ]
    for ours, theirs, keywords in doors:
        value, caught = recorded(lambda f=ours, k=keywords: f(*tensors, **k))
        expected, warned = recorded(lambda f=theirs, k=keywords: f(*tensors, **k))
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
        assert [c for c, _ in caught] == [c for c, _ in warned]
        assert {m for _, m in caught if "will be deprecated" in m} == {
            m for _, m in warned if "will be deprecated" in m
        }


def test_kl_div_mean_warns_as_torch_does(generator: Generator) -> None:
    x, t = (torch.rand(3, 4, generator=generator) for _ in range(2))
    for reduction in ("mean", "batchmean", "sum", "none"):
        _, caught = recorded(lambda r=reduction: functional.kl_div(x, t, reduction=r))
        _, warned = recorded(lambda r=reduction: torch.nn.functional.kl_div(x, t, reduction=r))
        assert len(caught) == len(warned) == (reduction == "mean")
        assert [c for c, _ in caught] == [c for c, _ in warned]


# explain


@each_dtype
@parameters_reduced()
def test_plain_tensors_take_the_kernel(
    case: Case, reduction: str, dtype: torch.dtype, generator: Generator
) -> None:
    tensors, options = case.example((5, 4), dtype, generator)
    found = fusedloss.explain(case.function, *tensors, **options, reduction=reduction)
    assert found.kernel and found.loss == case.loss.name
    assert str(found).startswith(f"{case.loss.name}: CPU kernel {found.kernel}")
    if has_module(case):
        module = getattr(nn, case.loss.module)(**options, reduction=reduction)
        assert fusedloss.explain(module, *tensors) == found


class Subclass(Tensor):
    @classmethod
    def __torch_dispatch__(cls, *seen):  # without one it takes the kernel
        return super().__torch_dispatch__(*seen)


def mapped(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: Any) -> None:
    torch.func.vmap(lambda *t: function(*t, **options))(*(t[None] for t in tensors))


def differentiated(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: Any
) -> None:
    torch.func.grad(lambda *t: function(*t, **options).sum())(*tensors)


def subclassed(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: Any) -> None:
    function(tensors[0].as_subclass(Subclass), *tensors[1:], **options)


def meta(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: Any) -> None:
    function(
        *(t.to("meta") for t in tensors),
        **{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in options.items()},
    )


def weighted(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], options: Any) -> None:
    weights = [v.clone() for k, v in options.items() if k.endswith("weight") and torch.is_tensor(v)]
    names = [k for k, v in options.items() if k.endswith("weight") and torch.is_tensor(v)]
    learned = dict(zip(names, (w.requires_grad_() for w in weights), strict=True))
    value = function(*tensors, **{**options, **learned})
    assert all(g.any() for g in torch.autograd.grad(value, weights))


SITUATIONS = {
    mapped: "a torch.func transform is active",
    differentiated: "a torch.func transform is active",
    subclassed: "Subclass is a tensor subclass",
    meta: "there are no kernels for meta tensors",
    weighted: "a weight requires a gradient",
}


def arises(case: Case, situation: Callable[..., None]) -> bool:
    if situation is weighted:
        _, options = case.example((5, 4), torch.float32, Generator())
        # Pointwise kernels differentiate by pos_weight, an operand of the formula.
        if case.kind == "multilabel":  # nor is a weight any other operand
            return False
        heads = case.kind == "heads"
        return any(
            torch.is_tensor(v) and (name == "weight" or (heads and name.endswith("weight")))
            for name, v in options.items()
        )
    if case.kind == "heads":
        return situation is meta
    # The distance function of a user makes plain tensors of a subclass.
    return not (situation is subclassed and case.option.startswith("lambda"))


@pytest.mark.parametrize(
    ("case", "situation"),
    [
        pytest.param(case, situation, id=f"{case}-{situation.__name__}")
        for case in CASES
        for situation in SITUATIONS
        if arises(case, situation)
    ],
)
def test_other_tensors_take_the_formula(
    case: Case, situation: Callable[..., None], generator: Generator
) -> None:
    tensors, options = case.example((5, 4), torch.float32, generator)
    found = fusedloss.explain(situation, case.loss.function, tensors, options)
    assert found.kernel is None and SITUATIONS[situation] in str(found)


def test_explain_needs_a_loss() -> None:
    with pytest.raises(ValueError, match="relu called no loss"):
        fusedloss.explain(torch.relu, torch.ones(1))


def test_calls_are_counted() -> None:
    before = trace.calls()["mse_loss", "kernel"]
    functional.mse_loss(torch.zeros(2), torch.zeros(2))
    assert trace.calls()["mse_loss", "kernel"] == before + 1
