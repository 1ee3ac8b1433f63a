"""Lazy heads: which they are, when they are lazy, and what becomes of them in copies and files."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fusedloss
from fusedloss import LazyLogits, LazyLogitsWarning, lazy_head, lazy_heads

from .test_rules import (
    FOUND,
    FUSED,
    LABELS,
    TOKENS,
    WEIGHT,
    C,
    D,
    Model,
    N,
    T,
    check,
    gradients,
    of_tokens,
)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def test_only_while_it_is_trained(model: Model) -> None:
    with lazy_heads(model, min_bytes=0):
        with torch.no_grad():
            assert type(model(TOKENS)) is Tensor
        assert type(model.eval()(TOKENS)) is Tensor
        assert type(model.train()(TOKENS)) is LazyLogits
        model.requires_grad_(False)
        assert type(model(TOKENS)) is Tensor
    with lazy_heads(model, always=True, min_bytes=0), torch.no_grad():
        assert type(model.eval()(TOKENS)) is LazyLogits
    assert type(model.lm_head) is nn.Linear


def test_small_logits_are_computed(model: Model) -> None:
    with lazy_heads(model):
        assert type(model(TOKENS)) is Tensor


def test_transforms_and_modes_see_torch(model: Model) -> None:
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return FUSED["shifted"](torch.func.functional_call(model, given, (TOKENS,)))

    expected = torch.func.grad(loss)(parameters)
    with lazy_heads(model, min_bytes=0):
        torch.testing.assert_close(torch.func.grad(loss)(parameters), expected)
        exported = torch.export.export(model, (TOKENS,))
        assert "linear" in exported.graph_module.code
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert type(model(TOKENS)) is not LazyLogits


def test_handles(model: Model) -> None:
    handle = lazy_heads(model, min_bytes=0)
    assert handle.heads == ("lm_head",) and "lm_head" in repr(handle)
    again = lazy_heads(model, min_bytes=0)
    assert again.heads == ()
    again.remove()
    assert type(model(TOKENS)) is LazyLogits
    handle.remove()
    handle.remove()
    assert type(model(TOKENS)) is Tensor and type(model.lm_head) is nn.Linear


def test_named_heads(model: Model) -> None:
    for name in ("lm_head", model.lm_head):
        with lazy_heads(model, name, min_bytes=0) as handle:
            assert handle.heads == ("lm_head",) and type(model(TOKENS)) is LazyLogits
    with lazy_head(model.lm_head, min_bytes=0):
        assert type(model(TOKENS)) is LazyLogits


def test_a_tied_head_is_found_without_its_name() -> None:
    model = Model(bias=False).double()
    model.output = model.lm_head
    del model.lm_head
    model.forward = lambda tokens: model.output(model.layer(model.embedding(tokens)))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"Model names no output embeddings.*'layer', 'output'"):
        lazy_heads(model)
    model.output.weight = model.embedding.weight
    with lazy_heads(model, min_bytes=0) as handle:
        assert handle.heads == ("output",) and type(model(TOKENS)) is LazyLogits


class Normalised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.layer_norm(input, (D,))) / 2


def test_a_head_that_does_more_than_its_product(model: Model) -> None:
    model.lm_head = Normalised(D, C).double()
    check(model, FUSED["shifted"], 0)


@pytest.mark.parametrize(
    "other", [nn.Embedding(4, 4), nn.Bilinear(2, 2, 2), nn.Sequential(nn.Linear(2, 2))]
)
def test_what_is_no_linear_map_stays(model: Model, other: nn.Module) -> None:
    model.add_module("other", other)
    words = rf"lazy_heads: the module 'other' \({type(other).__name__}\) is no torch.nn.Linear.*stays as it is"
    with pytest.raises(TypeError, match=words):
        lazy_heads(model, "lm_head", "other")
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(ValueError, match="the model has no module 'head'"):
        lazy_heads(model, "head")


def test_a_quantised_weight_stays(model: Model) -> None:
    model.lm_head.weight = nn.Parameter(torch.ones(C, D, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"has a weight of torch.uint8"):
        lazy_heads(model)


def test_copies_and_files_hold_the_head_that_it_was(model: Model) -> None:
    expected = of_tokens(model(TOKENS))
    with lazy_heads(model, min_bytes=0):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
        state = model.state_dict()
    for each in copies:
        assert type(each.lm_head) is nn.Linear
        torch.testing.assert_close(of_tokens(each(TOKENS)), expected)
    model.load_state_dict(state)


def test_saved_logits_are_numbers(model: Model) -> None:
    plain = model(TOKENS).detach()
    with lazy_heads(model, min_bytes=0), pytest.warns(LazyLogitsWarning):
        x = model(TOKENS).detach()
        assert torch.equal(pickle.loads(pickle.dumps(x)), plain)
        assert torch.equal(copy.deepcopy(x), plain)
        assert torch.equal(torch.from_numpy(x.numpy()), plain)


@pytest.mark.parametrize(
    "use", [lambda x: x.argmax(-1), lambda x: x + 1, lambda x: x.logsumexp(-1)]
)
def test_a_weight_that_changed_since_is_told(model: Model, use: Any) -> None:
    with lazy_heads(model, min_bytes=0):
        x = model(TOKENS)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        with pytest.raises(
            RuntimeError, match=r"lazy_head: the head's weight was changed in place"
        ):
            use(x)


def test_wrong_calls_fail_as_those_of_logits(model: Model) -> None:
    plain = model(TOKENS)
    calls: list[Callable[[Any], Any]] = [
        lambda x: F.cross_entropy(x.view(-1, C), LABELS.view(-1)[1:]),
        lambda x: F.cross_entropy(x.view(-1, C), FOUND.view(-1) + C),
        lambda x: F.cross_entropy(x.view(-1, C), LABELS.view(-1), weight=WEIGHT[1:]),
        lambda x: F.cross_entropy(x.view(-1, C), LABELS.view(-1), reduction="avg"),
        lambda x: x.view(-1, C + 1),
        lambda x: x[:, :, :, 0],
        lambda x: x.log_softmax(5),
        lambda x: x.transpose(0, 7),
        lambda x: x.gather(-1, FOUND),
    ]
    with lazy_heads(model, min_bytes=0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in calls:
            with pytest.raises(Exception) as expected:
                call(plain)
            with pytest.raises(expected.type):
                call(model(TOKENS))


def test_gradients_accumulate(model: Model) -> None:
    expected = [2 * g for g in gradients(model, FUSED["shifted"])[1]]
    with lazy_heads(model, min_bytes=0):
        model.zero_grad()
        for _ in range(2):
            FUSED["shifted"](model(TOKENS)).backward()
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], expected, rtol=1e-9, atol=1e-12
    )


def test_a_denominator(model: Model) -> None:
    def loss(x: Tensor) -> Tensor:
        return fusedloss.cross_entropy(x.view(-1, C), LABELS.view(-1), denominator=torch.tensor(7))

    expected = gradients(model, loss)
    with lazy_heads(model, min_bytes=0):
        assert "kernel linear" in str(fusedloss.explain(loss, model(TOKENS)))
        torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-9, atol=1e-12)


def test_memory_is_that_of_a_chunk() -> None:
    """Autograd holds nothing of the logits' size, and nobody else does."""
    model = Model().double()
    held: list[int] = []
    with (
        lazy_heads(model, min_bytes=0),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.append(t.numel()) or t, lambda t: t
        ),  # type: ignore[func-returns-value]
    ):
        x = model(TOKENS)
        of_tokens(x.float())
    assert max(held) < N * T * C
