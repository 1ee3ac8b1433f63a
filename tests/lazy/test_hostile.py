"""Lazy logits in the hands of those who know nothing of them: grad modes, hooks, writes, transforms, C++."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fusedloss import LazyLogits, lazy_head, lazy_heads

from .test_rules import FOUND, MASK, TOKENS, C, Model, N, Square, Step, T, gradients, of_tokens

pytestmark = pytest.mark.filterwarnings("ignore::fusedloss.LazyLogitsWarning")
INDEX = FOUND.unsqueeze(-1)
LEARNED = torch.linspace(0.5, 2, C, dtype=torch.float64).requires_grad_()
SCALE = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def compare(model: Model, step: Step) -> None:
    def run() -> Any:
        LEARNED.grad = SCALE.grad = None
        return *gradients(model, step), LEARNED.grad, SCALE.grad

    expected = run()
    with lazy_heads(model, min_bytes=0):
        assert isinstance(model(TOKENS), Tensor)
        torch.testing.assert_close(run(), expected, rtol=1e-9, atol=1e-11)


def without_gradient(step: Step) -> Step:
    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return step(x)

    return run


def shifted(x: Tensor) -> Tensor:
    return F.cross_entropy(x[:, :-1].flatten(0, 1), FOUND[:, 1:].flatten())


def in_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        x[:, :-1].sin()
    return x.sin().sum() + of_tokens(x)


def hook_after_a_view(x: Tensor) -> Tensor:
    view = x[:, :-1]
    x.register_hook(lambda g: 2 * g)
    return F.cross_entropy(view.flatten(0, 1), FOUND[:, 1:].flatten())


def write_through_a_view_of_values(x: Tensor) -> Tensor:
    view = x[:, :-1]
    x[..., 0].fill_(-5.0)
    return F.cross_entropy(view.flatten(0, 1), FOUND[:, 1:].flatten())


def inplace_function(x: Tensor) -> Tensor:
    view, copied = x[:, 1:], x.clone()
    F.relu(x, inplace=True)
    return view.square().sum() + of_tokens(copied)


def write_to_a_copy(x: Tensor) -> Tensor:
    copied = x.clone()
    view, other = copied[:, 1:], copied.clone()
    copied[0] = 0.0
    return view.square().sum() + of_tokens(other) + of_tokens(x)


def write_through_a_view_of_a_copy(x: Tensor) -> Tensor:
    view, of_rows = (copied := x.float().double())[:, 1:], copied.view(-1, C)
    of_rows.exp()
    del copied
    view.mul_(2.0)
    return of_rows.square().sum() + shifted(x)


def write_through_a_view_of_values_of_a_copy(x: Tensor) -> Tensor:
    copied = x.clone()
    view = copied[:, :-1]
    copied.exp()
    copied[..., 0].fill_(-5.0)
    return F.cross_entropy(view.flatten(0, 1), FOUND[:, 1:].flatten())


def written_then_in_c(x: Tensor) -> Tensor:
    x[:, 1:].div_(2.0)
    return Square.apply(x).sum()  # type: ignore[no-any-return]


def kept_without_gradient(x: Tensor) -> Tensor:
    kept = without_gradient(lambda v: v.log_softmax(-1))(x)
    return (kept.gather(-1, INDEX) * x.log_softmax(-1).gather(-1, INDEX)).sum() + kept.exp().sum()


STEPS: dict[str, Step] = {
    "kept from no_grad": kept_without_gradient,
    "teacher from no_grad": lambda x: F.kl_div(
        x.log_softmax(-1), without_gradient(lambda v: (2 * v).log_softmax(-1))(x), log_target=True
    ),
    "inference mode": in_inference,
    "hook after a view": hook_after_a_view,
    "a write to a view of the values": write_through_a_view_of_values,
    "a write to a copy": write_to_a_copy,
    "a write to a view of a copy": write_through_a_view_of_a_copy,
    "a write to a view of the values of a copy": write_through_a_view_of_values_of_a_copy,
    "an inplace function": inplace_function,
    "written, in C++": written_then_in_c,
    "bias that learns, in C++": lambda x: Square.apply((x + LEARNED)[:, 1:]).sum(),
    "scale that learns, in C++": lambda x: Square.apply(x / SCALE - LEARNED).sum(),
    "p x, in C++": lambda x: Square.apply(x.softmax(-1) * x).sum(),
    "checkpoint, reentrant": lambda x: checkpoint(of_tokens, x * SCALE, use_reentrant=True),  # type: ignore[return-value]
    "checkpoint": lambda x: checkpoint(of_tokens, x * SCALE, use_reentrant=False),  # type: ignore[return-value]
    "vmap around": lambda x: torch.func.vmap(lambda t: F.cross_entropy(x[0], t))(FOUND).sum(),
    "vmap": lambda x: torch.func.vmap(F.cross_entropy)(x, FOUND).sum(),
    "finite mask at labels": lambda x: of_tokens(x.masked_fill(~MASK, -1e4), label_smoothing=0.1),
    "mask scaled": lambda x: (x.masked_fill(MASK, -1e4) * 1e-4).gather(-1, INDEX * 0 + 6).sum(),
    "mask of all": lambda x: x[(x > 0)].sum() + x[torch.ones(N, T, C, dtype=torch.bool)].sum(),
    "by keyword": lambda x: (
        of_tokens(torch.mul(x, other=2.0).sub(other=LEARNED)) + x.logsumexp(axis=-1).sum()  # type: ignore[call-overload]
    ),
    "many of each row": lambda x: x.topk(C // 2).values.sum() + x.gather(-1, INDEX.tile(16)).sum(),
    "scale beyond numbers": lambda x: of_tokens(x * 1e-200 * 1e-200),
    "retain_grad before": lambda x: (x.retain_grad(), shifted(x))[1],
}


@pytest.mark.parametrize("name", STEPS)
def test_steps(model: Model, name: str) -> None:
    compare(model, STEPS[name])


@pytest.mark.parametrize("index", [[-1], [T], [0, T - 1, 0]])
def test_index_select_takes_what_it_takes_of_logits(model: Model, index: list[int]) -> None:
    def chosen() -> Any:
        try:
            return model(TOKENS).index_select(1, torch.tensor(index)).square().sum().item()
        except (RuntimeError, IndexError) as error:
            return type(error)

    with lazy_heads(model, min_bytes=0):
        found = chosen()
    assert found == pytest.approx(chosen()) if len(index) > 1 else found is chosen()


def test_script_takes_the_head_that_it_was(model: Model) -> None:
    lazy_heads(model, min_bytes=0)
    scripted = torch.jit.script(model)
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(scripted(TOKENS), model(TOKENS))
    with lazy_heads(model, min_bytes=0):
        assert isinstance(model(TOKENS), LazyLogits)


def test_targets_and_classes_out_of_range(model: Model) -> None:
    with lazy_heads(model, min_bytes=0):
        for index in (INDEX - C, INDEX + C):
            with pytest.raises((IndexError, RuntimeError)):
                model(TOKENS).gather(-1, index)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("which", ["head", "model"])
def test_backward_hooks_of_modules(model: Model, which: str) -> None:
    seen: list[Tensor] = []
    module = model.lm_head if which == "head" else model
    module.register_full_backward_hook(lambda _, __, outgoing: seen.append(outgoing[0]))
    compare(model, shifted)
    torch.testing.assert_close(seen[1], seen[0])


def test_a_gradient_of_what_never_was(model: Model) -> None:
    words = r"after a loss of theirs was computed without them. Call logits.retain_grad\(\) before"
    with lazy_heads(model, min_bytes=0):
        for ask in (
            lambda x, loss: torch.autograd.grad(loss, x),
            lambda x, _: x.retain_grad(),
            lambda x, _: x.register_hook(print),
        ):
            x = model(TOKENS)
            with pytest.raises(RuntimeError, match=words):
                ask(x, shifted(x))
        x = model(TOKENS)
        x.retain_grad()
        (found,) = torch.autograd.grad(shifted(x), x)
    assert found.shape == x.shape


@contextmanager
def half() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_autocast_is_that_of_the_operation() -> None:
    model = Model()
    with lazy_heads(model, min_bytes=0):
        x = model(TOKENS)
        with half():
            y = x.log_softmax(-1)
            found = y + 1
            assert x.sin().dtype is torch.float32 is x.dtype
        plain = F.linear(x.product.hidden, model.lm_head.weight, model.lm_head.bias)
        torch.testing.assert_close(x + 0, plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, plain.log_softmax(-1) + 1, rtol=1e-5, atol=1e-5)
        with half():
            Square.apply(model(TOKENS)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_larger_than_the_heads_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model().to(dtype)
    least = torch.finfo(torch.float32).min
    expected = of_tokens(model(TOKENS).float().masked_fill(MASK, least))
    with lazy_heads(model, min_bytes=0):
        found = of_tokens(model(TOKENS).float().masked_fill(MASK, least))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_always_lazy_where_nothing_learns(model: Model) -> None:
    plain, other = model(TOKENS).detach(), Model().double()
    with lazy_heads(model, always=True, min_bytes=0), lazy_heads(other, min_bytes=0):
        with torch.inference_mode():
            x = model(TOKENS)
            assert type(x) is LazyLogits and torch.equal(x.argmax(-1), plain.argmax(-1))
            torch.testing.assert_close(x + 0, plain)
            torch.testing.assert_close(of_tokens(x), of_tokens(plain))
        with torch.no_grad():
            x = model(TOKENS)
        assert not x.requires_grad and not (x + 1).requires_grad
        loss = F.kl_div(other(TOKENS).log_softmax(-1), x.softmax(-1)) + (x * other(TOKENS)).sum()
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_head_parametrised_while_it_is_lazy(model: Model) -> None:
    plain = of_tokens(model(TOKENS))
    handle = lazy_head(model.lm_head, min_bytes=0)
    parametrizations.weight_norm(model.lm_head, "weight")
    assert type(model(TOKENS)) is LazyLogits
    handle.remove()
    for each in (model, copy.deepcopy(model)):
        assert type(each(TOKENS)) is Tensor and isinstance(each.lm_head, nn.Linear)
        torch.testing.assert_close(of_tokens(each(TOKENS)), plain)
    with lazy_head(model.lm_head, min_bytes=0):
        assert type(model(TOKENS)) is LazyLogits
        torch.testing.assert_close(of_tokens(model(TOKENS)), plain)
