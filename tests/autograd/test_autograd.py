"""What backward finds: inputs changed since forward, hooks on what was saved, inference mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import CASES, Case, Options, Tensors, no_head, same_bits, tells_what_changed
from torch import Generator, Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

import fusedloss
from fusedloss import functional
from fusedloss.autograd import functions
from fusedloss.core import plain, torch_state
from fusedloss.route import memo

EAGER = list(filter(no_head, CASES))
each_case = pytest.mark.parametrize("case", EAGER, ids=str)
by_kernel = pytest.mark.parametrize(
    "case", [c for c in EAGER if c.loss.name != "triplet_margin_with_distance_loss"], ids=str
)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
MODIFIED = "modified by an inplace operation"


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    memo.known.clear()
    yield
    memo.known.clear()


def taken(
    function: Callable[..., Tensor], tensors: Tensors, options: Options, wanted: tuple[int, ...]
) -> tuple[Tensor, list[Tensor], list[Tensor], Options]:
    """The loss, its leaves, and what it was given: no leaves, so that they may be changed."""
    held = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    given = [t * 1 if t.requires_grad else t for t in held]
    settings = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    return function(*given, **settings), [held[k] for k in wanted], given, settings


def change(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(0.5) if tensor.is_floating_point() else tensor.zero_()


def gradients(value: Tensor, held: list[Tensor], **options: Any) -> tuple[Tensor, ...] | str:
    try:
        return torch.autograd.grad(value, held, torch.full_like(value, 0.7), **options)
    except RuntimeError as error:
        assert MODIFIED in str(error)
        return str(error)


@tells_what_changed
@each_case
@each_dtype
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_inputs_changed_before_backward(
    case: Case, dtype: torch.dtype, reduction: str, generator: Generator
) -> None:
    """What PyTorch allows after a reduced loss is allowed, and the gradient is that of what was given."""
    tensors, options = case.example((4, 5), dtype, generator)
    options = {**options, "reduction": reduction}
    stores = reduction == "mean" and dtype is not torch.float16
    for wanted in ((0,), case.loss.differentiable):
        value, held, *_ = taken(case.loss.function, tensors, options, wanted)
        right = gradients(value, held)
        for at in [*range(len(tensors)), *(k for k, v in options.items() if isinstance(v, Tensor))]:
            functions = case.loss.function, case.loss.function, case.theirs
            outcomes = []
            for function in functions:  # the first, one like it, and PyTorch's
                value, held, given, settings = taken(function, tensors, options, wanted)
                change(settings[at] if isinstance(at, str) else given[at])
                outcomes.append(gradients(value, held))
            *ours, theirs = outcomes
            for found in ours:
                if isinstance(found, str):
                    assert f"{case.loss.name}: " in found or isinstance(theirs, str)
                    assert not stores or isinstance(theirs, str), "PyTorch allows it"
                    continue
                for got, want in zip(found, right, strict=True):
                    # bfloat16 is rounded once more where the gradient cannot be computed anew.
                    assert_close(
                        got, want, rtol=2**-7 if dtype is torch.bfloat16 else 2**-22, atol=0
                    )


@tells_what_changed
@by_kernel
def test_only_create_graph_needs_what_was_changed(case: Case, generator: Generator) -> None:
    tensors, options = case.example((4, 5), torch.float64, generator)
    options = {**options, "reduction": "sum"}
    for _ in range(3):
        value, held, given, _ = taken(case.loss.function, tensors, options, (0,))
        right = torch.autograd.grad(value, held, retain_graph=True, create_graph=True)[0]
        change(given[0])
        found = gradients(value, held, create_graph=True)
        assert isinstance(found, str)
        assert found.startswith(f"{case.loss.name}: ")
        first, second = (torch.autograd.grad(value, held, retain_graph=k)[0] for k in (True, False))
        assert_close(first, right.detach())
        assert same_bits(first, second)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(value, held)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "key", ["cross_entropy", "cross_entropy[probabilities]", "triplet_margin_loss"]
)
def test_inputs_of_compiled_losses_changed_before_backward(key: str, generator: Generator) -> None:
    case = next(c for c in CASES if c.loss.key == key)
    tensors, options = case.example((4, 5), torch.float32, generator)
    torch._dynamo.reset()
    fast = torch.compile(case.loss.function, fullgraph=True, backend="aot_eager")
    for at in range(len(tensors)):
        value, held, given, _ = taken(fast, tensors, options, case.loss.differentiable)
        assert value.grad_fn is not None
        want = torch.autograd.grad(value, held, torch.tensor(0.7), retain_graph=True)
        change(given[at])
        got = torch.autograd.grad(value, held, torch.tensor(0.7))
        for g, w in zip(got, want, strict=True):
            assert same_bits(g, w)


def test_a_gradient_that_was_kept_and_then_changed() -> None:
    for _ in range(3):
        x = torch.randn(3, 5, requires_grad=True)
        value = functional.mse_loss(x, torch.zeros(3, 5))
        *_, gradient = (t for t in value.grad_fn.saved_tensors if t is not None)
        gradient.mul_(2)
        with pytest.raises(RuntimeError, match=MODIFIED):
            value.backward()


UNSTORED = [
    ("nll_loss", torch.float32, "none"),
    ("nll_loss", torch.float16, "mean"),
    ("mse_loss", torch.float16, "mean"),
    ("cross_entropy", torch.float16, "sum"),
    ("cross_entropy", torch.float32, "none"),
    ("kl_div", torch.float32, "none"),
    ("triplet_margin_loss", torch.float16, "mean"),
]
each_unstored = pytest.mark.parametrize(("name", "dtype", "reduction"), UNSTORED)


def example(name: str, dtype: torch.dtype, generator: Generator) -> Tensors:
    case = next(c for c in CASES if c.loss.key == name)
    return case.example((4, 6), dtype, generator)[0]


@each_unstored
def test_data_that_is_replaced(
    name: str, dtype: torch.dtype, reduction: str, generator: Generator
) -> None:
    """`.data` is not seen by autograd: another layout is read as it is, another size is refused."""
    function = getattr(functional, name)
    tensors = example(name, dtype, generator)
    wide = torch.full((6, 4), -3.0, dtype=dtype).t()
    for _ in range(4):
        for data, fits in (
            (wide, True),
            (wide.double(), True),
            (wide[:2], False),
            (wide[:, :1], False),
        ):
            leaf = tensors[0].clone().requires_grad_()
            x = leaf * 1
            value = function(x, *tensors[1:], reduction=reduction)
            expected_from = data.to(dtype).contiguous()
            x.data = data
            if not fits:
                with pytest.raises(
                    RuntimeError, match=rf"{name}: (input|anchor) was saved .* came back"
                ):
                    value.backward(torch.ones_like(value))
                continue
            (found,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
            other = expected_from.requires_grad_()
            again = function(other, *tensors[1:], reduction=reduction)
            (want,) = torch.autograd.grad(again, other, torch.ones_like(again))
            assert_close(found.to(dtype), want, rtol=2e-3, atol=0)


HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "gaps": lambda t: torch.stack((t, t), -1)[..., 0],
    "wider": lambda t: t.double() if t.is_floating_point() else t.int(),
    "subclass": lambda t: t.as_subclass(Marked),
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "copy": lambda t: t.clone(),
}


class Marked(Tensor):
    pass


@pytest.mark.one_in(3)
@by_kernel
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_hooks_that_give_other_tensors(
    case: Case, hook: Callable[[Tensor], Tensor], reduction: str, generator: Generator
) -> None:
    for dtype in (torch.float32, torch.float16):
        tensors, options = case.example((4, 5), dtype, generator)
        options = {**options, "reduction": reduction}
        value, held, *_ = taken(case.loss.function, tensors, options, case.loss.differentiable)
        want = torch.autograd.grad(value, held, torch.full_like(value, 0.7))
        for _ in range(3):
            with saved_tensors_hooks(lambda t: t.detach(), hook):
                value, held, *_ = taken(
                    case.loss.function, tensors, options, case.loss.differentiable
                )
            got = torch.autograd.grad(value, held, torch.full_like(value, 0.7))
            for g, w in zip(got, want, strict=True):
                assert_close(g.as_subclass(Tensor), w, rtol=2e-3, atol=1e-7)
            case.loss.function(*tensors, **options)


@by_kernel
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_hooks_that_give_other_sizes(case: Case, reduction: str, generator: Generator) -> None:
    """Nothing is read out of bounds."""
    tensors, options = case.example((6, 5), torch.float32, generator)
    for _ in range(2):
        with saved_tensors_hooks(lambda t: t, lambda t: t[:2].clone() if t.dim() else t):
            leaf = tensors[0].clone().requires_grad_()
            value = case.loss.function(leaf, *tensors[1:], **options, reduction=reduction)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(value, leaf, torch.ones_like(value))


@by_kernel
def test_hooks_keep_what_they_hold(case: Case, generator: Generator) -> None:
    """A buffer that a hook gives, and uses again, is neither scaled in place nor given away."""
    tensors, options = case.example((4, 5), torch.float32, generator)
    for incoming in (1.0, 3.0):
        for _ in range(3):
            kept: list[Tensor] = []

            def pack(tensor: Tensor) -> int:
                kept.append(tensor.detach().clone())  # noqa: B023
                return len(kept) - 1  # noqa: B023

            with saved_tensors_hooks(pack, lambda k: kept[k]):  # noqa: B023
                leaf = tensors[0].clone().requires_grad_()
                value = case.loss.function(leaf, *tensors[1:], **options, reduction="sum")
            before = [t.clone() for t in kept]
            (found,) = torch.autograd.grad(value, leaf, torch.tensor(incoming).to(value))
            found.zero_()
            for now, then in zip(kept, before, strict=True):
                assert same_bits(now, then)


@by_kernel
def test_backward_frees_what_was_saved(case: Case, generator: Generator) -> None:
    tensors, options = case.example((4, 5), torch.float32, generator)
    for _ in range(3):
        value, held, given, _ = taken(
            case.loss.function, tensors, {**options, "reduction": "sum"}, (0,)
        )
        alive = weakref.ref(given[0])
        del given, _
        torch.autograd.grad(value, held)
        assert alive() is None


@each_case
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensors_of_inference_mode(case: Case, reduction: str, generator: Generator) -> None:
    """Teachers, positives and weights that were made in inference mode, with learning inputs."""
    tensors, options = case.example((4, 5), torch.float32, generator)
    options = {**options, "reduction": reduction}
    with torch.inference_mode():
        others = [t.clone() for t in tensors[1:]]
        settings = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    for _ in range(3):
        leaf = tensors[0].clone().requires_grad_()
        value = case.loss.function(leaf, *tensors[1:], **options)
        want = torch.autograd.grad(value, leaf, torch.ones_like(value))[0]
        if "lambda" not in case.option or case.option == "lambda":
            value = case.loss.function(leaf, *others, **settings)
            got = torch.autograd.grad(value, leaf, torch.ones_like(value))[0]
            assert same_bits(got, want)


@each_case
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_enabled_within_inference_mode(
    case: Case, reduction: str, generator: Generator
) -> None:
    """As in PyTorch: nothing of it is differentiable, and nothing fails."""
    tensors, options = case.example((4, 5), torch.float32, generator)
    options = {**options, "reduction": reduction}
    leaf = tensors[0].clone().requires_grad_()
    want = case.loss.function(*tensors, **options)
    for _ in range(3):
        case.loss.function(leaf, *tensors[1:], **options)
        with torch.inference_mode(), torch.enable_grad():
            theirs = case.loss.reference(leaf, *tensors[1:], **options)
            ours = case.loss.function(leaf, *tensors[1:], **options)
        assert same_bits(ours, want)
        assert ours.is_inference()
        assert ours.requires_grad is theirs.requires_grad is False


# Names


def test_where_what_was_saved_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older PyTorch unpacks all saved tensors or none: then its error stands."""

    x = torch.randn(3, 5, requires_grad=True)
    y = x * 1
    value = functional.mse_loss(y, torch.zeros(3, 5))
    change(y)
    monkeypatch.setattr(torch_state, "unpacks_saved", False)
    with pytest.raises(RuntimeError, match=MODIFIED):
        value.backward()


def test_a_readable_gradient() -> None:
    assert plain.is_plain(torch.ones(()))
    assert plain.is_plain(torch.ones(0))
    for other in (torch._efficientzerotensor(()), torch.nn.Parameter(torch.ones(()))):
        assert not plain.is_plain(other)
    assert functions.is_plain is plain.is_plain


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("loss", ["mse_loss", "kl_div", "cross_entropy", "triplet_margin_loss"])
def test_what_is_changed_later_in_the_same_graph(loss: str) -> None:
    """A compiled loss has the gradient of what it was given."""
    x = torch.randn(4, 5, requires_grad=True)
    rest = [torch.tensor([0, 1, 2, 3])] if loss == "cross_entropy" else [x.detach() + 1]
    rest *= 2 if loss == "triplet_margin_loss" else 1

    def step(x: Tensor, *rest: Tensor, change: bool) -> Tensor:
        own = x * 2
        value = getattr(functional, loss)(own, *rest, reduction="sum")
        if change:
            own.zero_()
        return value

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x, *rest, change=True), x)
    (expected,) = torch.autograd.grad(step(x, *rest, change=False), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_hidden_states_changed_later_in_the_same_graph() -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])

    def step(x: Tensor, w: Tensor, change: bool, reduction: str) -> Tensor:
        own = x * 2
        value = fusedloss.linear_cross_entropy(own, w, target, reduction=reduction).sum()
        if change:
            own.zero_()
        return value

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, w, True, "mean"), (x, w))
    assert_close(found, torch.autograd.grad(step(x, w, False, "mean"), (x, w)))
    with pytest.raises(Exception, match="modified by an inplace operation"):
        compiled(x, w, True, "none")
