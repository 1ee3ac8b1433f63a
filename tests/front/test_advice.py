"""The commonest mistakes: PyTorch's exception, and the words that mend the call, which are run here."""

# ruff: noqa: E501 - a row of the table is a line

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import name_of
from torch import Tensor, tensor
from torch.nn import functional as theirs

from fusedloss import functional as ours

CE, NLL, MSE, KL = "cross_entropy", "nll_loss", "mse_loss", "kl_div"
BCE, LOGITS = "binary_cross_entropy", "binary_cross_entropy_with_logits"
BINARY, INDEXED = (BCE, LOGITS), (CE, NLL)


class Mistake(NamedTuple):
    """A call, and the expressions that its message offers in place of its arguments."""

    function: str
    what: str
    kind: type[Exception]
    arguments: dict[str, Any]
    fixes: tuple[str, ...]


def some(*shape: int) -> Tensor:
    return torch.linspace(0.1, 0.9, max(torch.Size(shape).numel(), 1)).reshape(shape)


def classes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def of(input: Any, target: Any, **options: Any) -> dict[str, Any]:
    return {"input": input, "target": target, **options}


class Output(NamedTuple):
    """What a model of transformers gives."""

    logits: Tensor


# fmt: off
MISTAKES = [
    *(Mistake(f, *row) for f in INDEXED for row in [
        ("(B, T, V) logits", RuntimeError, of(some(2, 5, 7), classes(2, 5)), ("input.transpose(1, 2)",)),
        ("(N, H, W, C) logits", RuntimeError, of(some(2, 3, 4, 7), classes(2, 3, 4)), ("input.movedim(-1, 1)",)),
        ("(B, T, V) logits, flat labels", ValueError, of(some(2, 5, 7), classes(10)), ("input.flatten(0, -2)",)),
        ("flat logits, (B, T) labels", ValueError, of(some(10, 7), classes(2, 5)), ("target.flatten()",)),
        ("labels in a column", RuntimeError, of(some(3, 4), classes(3, 1)), ("target.squeeze(1)",)),
        ("masks with a channel", RuntimeError, of(some(2, 7, 3, 4), classes(2, 1, 3, 4)), ("target.squeeze(1)",)),
        ("masks with a channel behind", RuntimeError, of(some(2, 7, 3, 4), classes(2, 3, 4, 1)), ("target.squeeze(3)",)),
        ("(C, N) logits", ValueError, of(some(4, 6), classes(6)), ("input.t()",)),
        ("one-hot integers, classes last", RuntimeError, of(some(2, 7, 3, 4), classes(2, 3, 4, 7)), ("target.argmax(-1)",)),
        ("float64 class weights", RuntimeError, of(some(3, 4), classes(3), weight=some(4).double()), ("weight.to(input.dtype)",)),
        ("float indices", RuntimeError, of(some(3, 4), some(3)), ("target.long()",)),
        ("a list of labels", TypeError, of(some(3, 4), [0, 1, 2]), ("torch.tensor(target)",)),
        ("a list of weights", TypeError, of(some(3, 4), classes(3), weight=[1.0] * 4), ("torch.tensor(weight)",)),
        ("a model's output", TypeError, of(Output(some(3, 4)), classes(3)), ("input.logits",)),
        ("a tuple of outputs", TypeError, of((some(3, 4), None), classes(3)), ("input[0]",)),
        ("padding of -1", IndexError, of(some(3, 4), tensor([0, -1, 1])), ("ignore_index=-1",)),
        ("a border of 255", IndexError, of(some(3, 4), tensor([0, 255, 1])), ("ignore_index=255",)),
    ]),
    Mistake(NLL, "one-hot floats", RuntimeError, of(some(3, 4), some(3, 4)), ("target.argmax(1)",)),
    Mistake(NLL, "one-hot floats in space", RuntimeError, of(some(2, 7, 3, 4), some(2, 7, 3, 4)), ("target.argmax(1)",)),
    Mistake(CE, "one-hot integers", RuntimeError, of(some(3, 4), classes(3, 4)), ("target.argmax(1)", "target.float()")),
    Mistake(CE, "probabilities, classes last", RuntimeError, of(some(2, 7, 3, 4), some(2, 3, 4, 7)), ("target.movedim(-1, 1)",)),
    Mistake(CE, "one image", ValueError, of(some(7, 3, 4), classes(3, 4)), ()),
    *(Mistake(f, *row) for f in BINARY for row in [
        ("(N, 1) against (N)", ValueError, of(some(3, 1), some(3)), ("target.unsqueeze(1)", "input.squeeze(1)")),
        ("(N) against (N, 1)", ValueError, of(some(3), some(3, 1)), ("target.squeeze(1)",)),
        ("(N, 1, H, W) against (N, H, W)", ValueError, of(some(2, 1, 3, 4), some(2, 3, 4)), ("target.unsqueeze(1)", "input.squeeze(1)")),
        ("class indices", ValueError, of(some(3, 4), classes(3)), ("torch.nn.functional.one_hot(target, 4).float()",)),
        ("class indices in space", ValueError, of(some(2, 7, 3, 4), classes(2, 3, 4)), ("torch.nn.functional.one_hot(target, 7).movedim(-1, 1).float()",)),
        ("Long targets", RuntimeError, of(some(3, 4), classes(3, 4)), ("target.float()",)),
        ("a weight of each row", RuntimeError, of(some(2, 3), some(2, 3), weight=some(2)), ("weight.view(-1, 1)",)),
        ("a weight of each channel", RuntimeError, of(some(2, 3, 4, 5), some(2, 3, 4, 5), weight=some(3)), ("weight.view(-1, 1, 1)",)),
    ]),
    Mistake(BCE, "Long targets of float64", RuntimeError, of(some(3).double(), classes(3)), ("target.double()",)),
    Mistake(BCE, "a number for weight", AttributeError, of(some(3), some(3), weight=2), ("torch.tensor(2.0)",)),
    Mistake(LOGITS, "pos_weight of each channel", RuntimeError, of(some(2, 3, 4, 5), some(2, 3, 4, 5), pos_weight=some(3)), ("pos_weight.view(-1, 1, 1)",)),
    Mistake(LOGITS, "a number for pos_weight", TypeError, of(some(3), some(3), pos_weight=2.5), ("torch.tensor(2.5)",)),
    Mistake(LOGITS, "a number of numpy's for pos_weight", TypeError, of(some(3), some(3), pos_weight=np.float32(2.5)), ("torch.tensor(2.5)",)),
    Mistake(KL, "Long targets", RuntimeError, of(some(3, 4), classes(3, 4)), ("target.float()",)),
    Mistake(MSE, "integers", NotImplementedError, of(classes(3), classes(3)), ("input.float()",)),
]
# fmt: on


@pytest.mark.filterwarnings("ignore:.*'mean' divides")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.function}: {m.what}")
def test_mistake_and_its_fix(mistake: Mistake) -> None:
    name, arguments = mistake.function, mistake.arguments
    with pytest.raises(mistake.kind):
        getattr(theirs, name)(**arguments)
    with pytest.raises(mistake.kind, match=f"^{name}: ") as caught:
        getattr(ours, name)(**arguments)
    message = str(caught.value)
    for fix in mistake.fixes:
        assert fix in message, message
        changed, value = mended(fix, arguments)
        result = getattr(ours, name)(**{**arguments, changed: value})
        torch.testing.assert_close(result, getattr(theirs, name)(**{**arguments, changed: value}))


def mended(fix: str, arguments: dict[str, Any]) -> tuple[str, Any]:
    """The argument that the expression replaces, and its value."""
    if keyword := re.fullmatch(r"(\w+)=(-?\d+)", fix):
        return keyword[1], int(keyword[2])
    value = eval(fix, {"torch": torch, **arguments})
    names = [
        name for name in arguments if re.search(rf"\b{name}\b", fix.replace("input.dtype", ""))
    ]
    if not names:  # a number
        names = [n for n, v in arguments.items() if not isinstance(v, Tensor)]
    return names[0], value


# fmt: off
WORDS = [
    *((f, NotImplementedError, of(classes(3, 4), some(3, 4)), "input and target in the wrong order") for f in (CE, LOGITS)),
    (NLL, RuntimeError, of(classes(3), some(3, 4)), "input and target in the wrong order"),
    *((f, RuntimeError, of(classes(3, 4), some(3, 4)), "input and target in the wrong order") for f in (BCE, KL)),
    (CE, ValueError, of(some(7, 3, 4), classes(3, 4)), r"input\.unsqueeze\(0\) and target\.unsqueeze\(0\)"),
    (CE, IndexError, of(some(3, 4), tensor([1, 2, 4])), "Classes are numbered from 0"),
    (CE, IndexError, of(some(3, 1), tensor([0, 1, 0])), "binary_cross_entropy_with_logits"),
    (CE, RuntimeError, of(some(8), classes(8)), "One logit a row is for binary_cross_entropy_with_logits"),
    (BCE, RuntimeError, of(some(3, 4) + 1, some(3, 4)), r"input\[0, 0\] = 1\.1 \(for logits: binary_cross_entropy_with_logits\)$"),
    (BCE, RuntimeError, of(some(3, 4) * float("nan"), some(3, 4)), r"input\[0, 0\] = nan: what was computed before"),
    (LOGITS, RuntimeError, of(some(2, 3), some(2, 3), pos_weight=some(3).to(torch.complex64)), "^binary_cross_entropy_with_logits: pos_weight must be real"),
    (LOGITS, TypeError, of(some(2, 3), some(2, 3), pos_weight=2.0), r"argument 'pos_weight' must be Tensor, not float: pass torch\.tensor\(2\.0\)"),
    (KL, RuntimeError, of(some(3, 4), classes(3)), "class indices to nll_loss"),
    (CE, TypeError, of(np.zeros((3, 4)), classes(3)), r"'input' must be Tensor, not ndarray: pass torch\.from_numpy\(input\)$"),
    (BCE, RuntimeError, of(tensor([0.5, 1 + 2**-23]), some(2)), r"input\[1\] = 1\.00000011920\d+ \(for logits"),
    (BCE, RuntimeError, of(some(2), tensor([0.5, 1 + 2**-23])), r"target\[1\] = 1\.00000011920\d+$"),
    (MSE, RuntimeError, of(some(3), some(3), size_average=some(3)), r"^mse_loss: argument 'size_average' must be bool, not Tensor of shape \[3\]"),
    (MSE, RuntimeError, of(some(3), some(3), reduce=some(3)), r"^mse_loss: argument 'reduce' must be bool"),
]
# fmt: on


@pytest.mark.filterwarnings("ignore:.*'mean' divides")
@pytest.mark.parametrize(("function", "kind", "arguments", "words"), WORDS)
def test_words(function: str, kind: type[Exception], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(kind):
        getattr(theirs, function)(**arguments)
    with pytest.raises(kind, match=words):
        getattr(ours, function)(**arguments)


def test_words_of_heads_speak_of_their_own_arguments() -> None:
    """Their logits are no argument: nothing is said of an input that holds classes."""
    for logits, target, words in [
        ((2, 5, 7), (2, 5), r"\[2, 5\]$"),
        ((6, 4), (6, 1), r"pass target\.squeeze\(1\)$"),
        ((6, 4), (2, 3), r"pass target\.flatten\(\)$"),
        ((6, 4), (4,), r"target \[4\]$"),
    ]:
        hidden, head = some(logits[0], 3), some(*logits[1:], 3)
        with pytest.raises((RuntimeError, ValueError), match=words):
            ours.linear_cross_entropy(hidden, head, classes(*target))


NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]
TRIPLET = ("triplet_margin_loss", "triplet_margin_with_distance_loss")


@pytest.mark.parametrize("dtype", NARROW, ids=name_of)
@pytest.mark.parametrize(
    "arguments",
    [
        "input",
        "linear_weight",
        "input linear_weight",
        "target",
        "weight",
        "sample_weight",
        "teacher_logits",
        "teacher_input teacher_weight",
    ],
)
def test_types_for_storage_are_refused_in_heads(arguments: str, dtype: torch.dtype) -> None:
    names = arguments.split()
    given = {"input": some(3, 2), "linear_weight": some(4, 2)}
    if "teacher" in arguments:
        function, odd = ours.linear_kl_div, some(3, 4)
        odd = {"teacher_input": some(3, 2), "teacher_weight": some(4, 2), "teacher_logits": odd}
    else:
        function, given["target"] = ours.linear_cross_entropy, classes(3)
        odd = {**given, "target": some(3, 4), "weight": some(4), "sample_weight": some(3)}
    given = {**given, **{name: odd[name].to(dtype) for name in names}}
    words = rf"^{function.__name__}: .*pass {names[0]}\.(float|to)\("
    with pytest.raises((RuntimeError, NotImplementedError), match=words):
        function(**given)


def test_options_of_another_kind_are_refused_by_name() -> None:
    words = "^linear_cross_entropy: argument 'options' must be torch.nn.LinearCrossEntropyOptions, not int"
    with pytest.raises(AttributeError, match=words):
        ours.linear_cross_entropy(some(3, 2), some(4, 2), classes(3), options=3)


def test_a_swap_of_several_numbers_is_refused_by_name() -> None:
    words = r"^triplet_margin_with_distance_loss: argument 'swap' must be bool, not Tensor of shape \[2\]"
    x = some(3, 4)
    with pytest.raises(RuntimeError, match=words):
        ours.triplet_margin_with_distance_loss(x, x, x, swap=some(2))
    ours.triplet_margin_with_distance_loss(x, x, x, swap=some(1))


@pytest.mark.filterwarnings("ignore:.*'mean' divides")
@pytest.mark.parametrize("dtype", NARROW, ids=name_of)
@pytest.mark.parametrize("function", [CE, NLL, MSE, KL, *BINARY, *TRIPLET])
def test_types_for_storage_are_refused_by_name(function: str, dtype: torch.dtype) -> None:
    """In any place, and in all."""
    target = classes(3) if function in INDEXED else some(3, 4)
    tensors = [some(3, 4), target, *[some(3, 4)] * (function in TRIPLET)]
    places = [k for k, t in enumerate(tensors) if t.is_floating_point()]
    for chosen in [*([k] for k in places), places]:
        given = [t.to(dtype) if k in chosen else t for k, t in enumerate(tensors)]
        with pytest.raises((RuntimeError, NotImplementedError)) as expected:
            getattr(theirs, function)(*given)
        with pytest.raises(expected.type) as caught:
            getattr(ours, function)(*given)
        assert type(caught.value) is expected.type
        message = str(caught.value)
        assert message.startswith(f"{function}: ") and str(dtype) in message, message
        assert re.search(r"pass \w+\.float\(\)", message), message


def test_compiled_binary_cross_entropy_names_itself() -> None:
    torch._dynamo.reset()
    fast = torch.compile(ours.binary_cross_entropy, backend="aot_eager")
    with pytest.raises(
        RuntimeError, match=r"^binary_cross_entropy: all elements of input and target"
    ):
        fast(some(3) + 1, some(3))
