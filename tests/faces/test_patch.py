"""`fusedloss.patch()`: unedited code runs our losses, and all else about them is PyTorch's."""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import itertools
import os
import pickle
import re
import sys
import threading
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import Case, parameters, run
from elsewhere import run_python
from records import LOSSES, module_errors, op_errors
from torch import Generator, Tensor

# Bound before any patch, as in a library that was imported earlier.
from torch.nn import CrossEntropyLoss
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum

import fusedloss
from fusedloss.core import caches, trace

module = sys.modules["fusedloss.patch"]  # whose name is the function's, too

os.environ["HF_HUB_OFFLINE"] = "1"

# torch.compile's own, of any autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    fusedloss.unpatch()


def counted(function: Callable[[], Any]) -> tuple[Any, Counter[tuple[str, str]]]:
    """The result, and the calls of our losses that it took."""
    before = trace.calls()
    result = function()
    return result, trace.calls() - before


def example(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 5, generator=generator), torch.tensor([0, 4, 2])


@parameters(lambda case: case.loss.composed is None)
def test_functions_and_modules_run_our_kernels(case: Case, generator: Generator) -> None:
    tensors, options = case.example((4, 5), torch.float32, generator)
    wanted = case.loss.differentiable
    expected = run(case.loss.torch_function, tensors, options, wanted)
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
            if "margin" in settings or name.startswith("linear_"):
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
    expected = run(case.loss.torch_function, tensors, options, wanted)
    torch._dynamo.reset()
    fast = torch.compile(case.loss.torch_function, fullgraph=True, backend="aot_eager")
    with fusedloss.patched():
        found, calls = counted(lambda: run(fast, tensors, options, wanted))
    assert_close(found.value, expected.value)
    assert_close(found.grads, expected.grads)
    if case.loss.rows and "lambda" not in case.option:
        assert calls.total() == 1


def test_what_was_compiled_before_is_compiled_again(generator: Generator) -> None:
    x, target = example(generator)
    torch._dynamo.reset()
    fast = torch.compile(CrossEntropyLoss(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert not counted(lambda: fast(x, target))[1]
        with fusedloss.patched():
            assert counted(lambda: fast(x, target))[1] == {("cross_entropy", "kernel"): 1}


# Others who replace functions of torch.nn.functional


def liger_cross_entropy(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Tensor:
    return input.sum()


def wrapper_of(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    return wrapper


QUALIFIED = "wrapper_of.<locals>." if sys.version_info >= (3, 11) else ""
STAND_INS = {
    "function": (lambda _: liger_cross_entropy, "test_patch.liger_cross_entropy"),
    "wrapper": (wrapper_of, f"test_patch.{QUALIFIED}wrapper"),
    "partial": (
        lambda f: functools.partial(f, label_smoothing=0.1),
        "a partial of torch.nn.functional.cross_entropy",
    ),
    "mock": (lambda _: unittest.mock.MagicMock(), "unittest.mock.MagicMock"),
    "class": (lambda _: CrossEntropyLoss, "torch.nn.modules.loss.CrossEntropyLoss"),
}


ORDERS = list(itertools.permutations(["patch", "assign", "unpatch", "put back"]))


def in_place() -> set[bool]:
    """Of each function, of the name that patched code looks up and of torch's caches: whether patched."""
    codes = {f.__code__ is not module.ORIGINALS[n].__code__ for n, f in module.FUNCTIONS.items()}
    doors = {"__prepare_scriptable__" in vars(f) for f in module.FUNCTIONS.values()}
    marked = caches.MARK in torch.compiler.config.cache_key_tag
    return {*codes, *doors, hasattr(F, module.NAME), marked}


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
    before = fusedloss.core.trace.calls()
    assert F.cross_entropy(x, y) == F.cross_entropy(input=x, target=y) == "liger"
    assert F.nll_loss(x, y) == ("apex", -1)
    assert F.mse_loss(x, x + 1) == 6
    assert F.kl_div(x, x) == "mock"
    assert torch.nn.modules.loss.CrossEntropyLoss.forward.__globals__["F"] is F
    assert F.binary_cross_entropy(x, x) == 0
    assert fusedloss.core.trace.calls() - before == {("binary_cross_entropy", "kernel"): 1}
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
    with pytest.warns(UserWarning, match=r"cross_entropy \(with code from .*test_patch.py\)"):
        fusedloss.patch()
    assert cross_entropy(x, target) == "foreign"
    fusedloss.unpatch()
    cross_entropy.__code__ = ours  # as they found it, whereas nothing is patched any more
    value, calls = counted(lambda: cross_entropy(x, target))
    assert not calls
    fusedloss.unpatch()
    assert cross_entropy.__code__ is code
    assert_close(value, cross_entropy(x, target))


# Interrupts and threads


def interrupted(function: Callable[[], None], step: int) -> bool:
    """Runs with a KeyboardInterrupt at the step-th place in patch.py where Python looks for signals.

    Whether there was such a place.
    """
    count, previous = 0, {}

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        code = frame.f_code
        if code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            done = previous.get(frame, "RESUME")
            previous[frame] = dis.opname[code.co_code[frame.f_lasti]]
            # After a call, a jump back and at the start: between others a lock could be taken for good.
            count += done.startswith(("CALL", "JUMP_BACKWARD", "RESUME"))
            if count >= step:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def a_block() -> None:
    with fusedloss.patched():
        pass


@pytest.mark.parametrize("function", [fusedloss.patch, fusedloss.unpatch, a_block])
def test_an_interrupt_leaves_what_unpatch_mends(function: Callable[[], None]) -> None:
    before = {n: (f.__code__, dict(vars(f))) for n, f in module.FUNCTIONS.items()}
    fusedloss.patch()  # the redirections are made
    step = 0
    came = True
    while came:
        (fusedloss.patch if function is fusedloss.unpatch else fusedloss.unpatch)()
        step += 1
        came = interrupted(function, step)
        assert not module._lock._is_owned(), step
        if function is fusedloss.patch:
            assert len(in_place()) == 1, step  # all or nothing
        fusedloss.unpatch()
        assert in_place() == {False}, step
        assert {n: (f.__code__, dict(vars(f))) for n, f in module.FUNCTIONS.items()} == before
        with fusedloss.patched():
            assert in_place() == {True}, step
        assert in_place() == {False}, step
    assert step > 30


def test_to_patch_again_and_be_interrupted_changes_nothing() -> None:
    fusedloss.patch()
    step, came = 0, True
    while came:
        step += 1
        came = interrupted(fusedloss.patch, step)
        assert in_place() == {True}, step
    fusedloss.unpatch()
    assert in_place() == {False}


def test_a_block_ends_with_the_last_that_overlaps() -> None:
    """As two threads' do."""
    blocks = [fusedloss.patched() for _ in range(2)]
    for block in blocks:
        block.__enter__()
    assert in_place() == {True}
    for block, after in zip(blocks, (True, False), strict=True):
        block.__exit__(None, None, None)
        assert in_place() == {after}
    with fusedloss.patched():
        fusedloss.patch()
    assert in_place() == {True}


def test_threads_patch_and_call_at_once(generator: Generator) -> None:
    x, target = example(generator)
    expected = cross_entropy(x, target).item()
    failures: list[str] = []
    before = sys.getswitchinterval()

    def work(which: int) -> None:
        try:
            for _ in range(100):
                if which == 0:
                    fusedloss.patch()
                    fusedloss.unpatch()
                elif which == 1:
                    with fusedloss.patched():
                        pass
                assert abs(cross_entropy(x, target).item() - expected) < 1e-5
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures
    fusedloss.unpatch()
    assert in_place() == {False}


def test_a_reload_keeps_the_patch(generator: Generator) -> None:
    x, target = example(generator)
    code = cross_entropy.__code__
    for patched in (True, False):
        if patched:
            fusedloss.patch()
        importlib.reload(module)
        assert in_place() == {patched}
        assert bool(counted(lambda: cross_entropy(x, target))[1]) is patched
        fusedloss.unpatch()
        assert cross_entropy.__code__ is code


# Other people's libraries, as they are


def curve(
    build: Callable[[], tuple[list[Any], Callable[[int], Tensor]]], steps: int
) -> list[float]:
    """The losses of so many steps of training from one seed."""
    torch.manual_seed(0)
    parameters, loss_of = build()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_training(build: Any, name: str, steps: int = 12) -> None:
    expected = curve(build, steps)
    with fusedloss.patched():
        found, calls = counted(lambda: curve(build, steps))
    assert calls[name, "kernel"] == steps
    assert not any(path == "formula" for _, path in calls)
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert found[-1] < found[0]


def causal_lm() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(97, (4, 16))
    labels = ids.clone()
    labels[:, :3] = -100
    return list(model.parameters()), lambda step: model(input_ids=ids, labels=labels).loss


def sequence_classifier(problem: str) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
        problem_type=problem,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    ids = torch.randint(97, (8, 12))
    labels = {
        "single_label_classification": torch.randint(3, (8,)),
        "multi_label_classification": torch.randint(2, (8, 3)).float(),
        "regression": torch.randn(8, 3),
    }[problem]
    return list(model.parameters()), lambda step: model(input_ids=ids, labels=labels).loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_causal_lm() -> None:
    pytest.importorskip("transformers")
    check_training(causal_lm, "cross_entropy")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("problem", "name"),
    [
        ("single_label_classification", "cross_entropy"),
        ("multi_label_classification", "binary_cross_entropy_with_logits"),
        ("regression", "mse_loss"),
    ],
)
def test_transformers_sequence_classifier(problem: str, name: str) -> None:
    pytest.importorskip("transformers")
    check_training(lambda: sequence_classifier(problem), name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "loss", ["ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "SoftTripleLoss"]
)
def test_pytorch_metric_learning(loss: str) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")

    def build() -> Any:
        trunk = torch.nn.Linear(20, 8)
        head = getattr(losses, loss)(num_classes=5, embedding_size=8)
        x, labels = torch.randn(32, 20), torch.randint(5, (32,))
        parameters = [*trunk.parameters(), *head.parameters()]
        return parameters, lambda step: head(trunk(x), labels)

    check_training(build, "cross_entropy")


def test_error_message_names_the_function() -> None:
    with (
        fusedloss.patched(),
        pytest.raises(IndexError, match=re.escape("cross_entropy: target[1] = 9")),
    ):
        CrossEntropyLoss()(torch.rand(2, 3), torch.tensor([0, 9]))
