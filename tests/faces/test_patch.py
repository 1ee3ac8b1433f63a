"""`fusedloss.patch()`: unedited code runs our losses, and all else about them is PyTorch's."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import Case, parameters, run
from patching import _restored, counted, example  # noqa: F401
from records import LOSSES, module_errors, op_errors
from torch import Generator, Tensor

# Bound before any patch, as in a library that was imported earlier.
from torch.nn import CrossEntropyLoss
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum

import fusedloss

# torch.compile's own, of any autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@parameters(lambda case: case.loss.composed is None)
def test_functions_and_modules_run_our_kernels(case: Case, generator: Generator) -> None:
    tensors, options = case.example((4, 5), torch.float32, generator)
    wanted = case.loss.differentiable
    expected = run(case.theirs, tensors, options, wanted)
    with fusedloss.patched():
        found, calls = counted(lambda: run(case.loss.torch_function, tensors, options, wanted))
    assert calls == {(case.loss.name, "kernel"): 1}
    assert_close(found.value, expected.value)
    assert_close(found.grads, expected.grads)
    if set(options) <= set(inspect.signature(getattr(torch.nn, case.loss.module)).parameters):
        module = getattr(torch.nn, case.loss.module)(**options)
        with fusedloss.patched():
            found, calls = counted(lambda: run(module, tensors, {}, wanted))
        assert calls == {(case.loss.name, "kernel"): 1}
        assert_close(found.value, expected.value)


def test_names_bound_earlier_run_ours_too(generator: Generator) -> None:
    x, target = example(generator)
    subclass = type("Mine", (CrossEntropyLoss,), {})()
    made_before = CrossEntropyLoss()
    calls_of = [cross_entropy, F.cross_entropy, CrossEntropyLoss(), made_before, subclass]
    with fusedloss.patched():
        for call in calls_of:
            assert counted(lambda call=call: call(x, target))[1] == {("cross_entropy", "kernel"): 1}
    for call in calls_of:
        assert not counted(lambda call=call: call(x, target))[1]


@pytest.mark.parametrize("name", LOSSES)
def test_a_patched_function_looks_the_same(name: str) -> None:
    function = getattr(F, name)
    facts = [
        lambda: function.__name__,
        lambda: function.__qualname__,
        lambda: function.__module__,
        lambda: function.__doc__,
        lambda: function.__defaults__,
        lambda: function.__kwdefaults__,
        lambda: inspect.signature(function),
        lambda: function.__code__.co_varnames[: function.__code__.co_argcount],
        lambda: pickle.loads(pickle.dumps(function)) is function,
        lambda: torch.overrides.resolve_name(function),
    ]
    before, attributes = [fact() for fact in facts], dict(vars(function))
    with fusedloss.patched():
        assert getattr(F, name) is function
        assert [fact() for fact in facts] == before
    assert dict(vars(function)) == attributes
    theirs = list(inspect.signature(function).parameters)
    ours = list(inspect.signature(getattr(fusedloss, name)).parameters)
    assert ours[: len(theirs)] == theirs  # keywords of our own may follow


def test_patch_and_unpatch(generator: Generator) -> None:
    x, target = example(generator)
    code = cross_entropy.__code__

    def kernels() -> int:
        return counted(lambda: cross_entropy(x, target))[1].total()

    fusedloss.unpatch()
    fusedloss.patch()
    fusedloss.patch()
    assert kernels() == 1
    with fusedloss.patched():
        assert kernels() == 1
    assert kernels() == 1
    fusedloss.unpatch()
    fusedloss.unpatch()
    assert kernels() == 0
    with pytest.raises(ZeroDivisionError), fusedloss.patched(), fusedloss.patched():
        raise ZeroDivisionError
    assert cross_entropy.__code__ is code
    assert not hasattr(F, "_fusedloss")
    assert not hasattr(cross_entropy, "__prepare_scriptable__")


def test_torchscript_finds_the_originals(generator: Generator) -> None:
    x, y = torch.randn(2, 3, 5, generator=generator).softmax(-1)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = torch.nn.MSELoss()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.loss(a, b) + F.mse_loss(a, b) + F.kl_div(a, b, reduction="sum")

    expected = Model()(x, y)
    with fusedloss.patched(), pytest.warns(match="`torch.jit.script` is deprecated"):
        scripted = torch.jit.script(Model())
        result, calls = counted(lambda: scripted(x, y))
        direct = torch.jit.script(F.mse_loss)
        assert_close(direct(x, y), mse_loss(x, y))
    assert not calls
    assert_close(result, expected)
    assert "aten::mse_loss" in str(scripted.inlined_graph)


def test_fx_records_the_function_of_torch() -> None:
    class Model(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.mse_loss(a, b)

    with fusedloss.patched():
        graph = torch.fx.symbolic_trace(Model()).graph
    assert F.mse_loss in [node.target for node in graph.nodes]


class Strict(Tensor):
    """Knows functions by identity, as many a library's subclass does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.mse_loss:
            return "known"
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_get_the_functions_of_torch(generator: Generator) -> None:
    x, y = torch.randn(2, 3, 5, generator=generator)
    with fusedloss.patched():
        assert F.mse_loss(x.as_subclass(Strict), y) == "known"
        assert not counted(lambda: F.mse_loss(x.to("meta"), y.to("meta")))[1]["mse_loss", "kernel"]


@pytest.mark.parametrize("name", LOSSES)
def test_error_inputs_through_the_patched_doors(name: str) -> None:
    with fusedloss.patched():
        for error in op_errors(name):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                getattr(F, name)(sample.input, *sample.args, **sample.kwargs)
            assert str(caught.value).startswith(f"{name}: ")
            settings = {k: v for k, v in sample.kwargs.items() if k != "swap"}
            weight = settings.get("weight")
            odd = weight is not None and weight.dim() != 1 and name == "multi_margin_loss"
            if odd or "margin" in settings or name.startswith("linear_"):
                continue  # the module's constructor, which stays PyTorch's, refuses it
            with pytest.raises(error.error_type, match=error.error_regex):
                getattr(torch.nn, LOSSES[name])(**settings)(sample.input, *sample.args)
        for error in module_errors(name, torch.float32):
            given = error.module_error_input
            if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
                continue
            module = getattr(torch.nn, LOSSES[name])(
                *given.constructor_input.args, **given.constructor_input.kwargs
            )
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                module(*given.forward_input.args)
            assert str(caught.value).startswith(f"{name}: ")


@parameters(lambda case: case.loss.composed is None)
def test_compile(case: Case, generator: Generator) -> None:
    tensors, options = case.example((4, 5), torch.float32, generator)
    wanted = case.loss.differentiable
    expected = run(case.theirs, tensors, options, wanted)
    torch._dynamo.reset()
    fast = torch.compile(case.loss.torch_function, fullgraph=True, backend="aot_eager")
    with fusedloss.patched():
        found, calls = counted(lambda: run(fast, tensors, options, wanted))
    assert_close(found.value, expected.value)
    assert_close(found.grads, expected.grads)
    # Reduced, a mean of classes is one of elements, which are the formula's where they are few.
    if case.loss.rows and case.loss.kind != "multilabel" and "lambda" not in case.option:
        assert calls.total() == 1


def test_what_was_compiled_before_is_compiled_again(generator: Generator) -> None:
    x, target = example(generator)
    torch._dynamo.reset()
    fast = torch.compile(CrossEntropyLoss(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert not counted(lambda: fast(x, target))[1]
        with fusedloss.patched():
            assert counted(lambda: fast(x, target))[1] == {("cross_entropy", "kernel"): 1}


def test_error_message_names_the_function() -> None:
    with (
        fusedloss.patched(),
        pytest.raises(IndexError, match=re.escape("cross_entropy: target[1] = 9")),
    ):
        CrossEntropyLoss()(torch.rand(2, 3), torch.tensor([0, 9]))
