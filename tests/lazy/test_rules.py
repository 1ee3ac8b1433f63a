"""Lazy logits against the logits: each operation, by itself and on its way to a loss."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fusedloss
from fusedloss import LazyLogits, LazyLogitsWarning, lazy_heads
from fusedloss.core import trace
from fusedloss.route import heads

N, T, C, D = 3, 7, 50, 8
Step = Callable[[Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(C, D)
        self.layer = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, C, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.layer(self.embedding(tokens))))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


TOKENS = torch.randint(C, (N, T), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(C, (N, T), generator=torch.Generator().manual_seed(2))
LABELS[0, 2] = -100
FOUND = LABELS.clamp(min=0)
ROWS = LABELS != -100
WEIGHT = torch.linspace(0.1, 1, C, dtype=torch.float64)
SOFT = torch.softmax(
    torch.randn(N, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), -1
)
MASK = torch.zeros(C, dtype=torch.bool)
MASK[5:9] = True
MASK[FOUND.unique()] = False


def of_tokens(x: Tensor, **settings: Any) -> Tensor:
    return F.cross_entropy(x.view(-1, x.shape[-1]), LABELS.view(-1), **settings)


def smoothed(x: Tensor) -> Tensor:
    """As a trainer writes label smoothing."""
    log_p = -F.log_softmax(x, dim=-1)
    own = log_p.gather(dim=-1, index=FOUND.unsqueeze(-1))
    of_all = log_p.sum(dim=-1, keepdim=True, dtype=torch.float64)
    return 0.9 * own.sum() + 0.1 * of_all.sum() / log_p.shape[-1]


def entropy_in_chunks(x: Tensor) -> Tensor:
    found = []
    for part in x.flatten(0, 1).split(4, dim=0):
        log_p = F.log_softmax(part, dim=-1)
        found.append(-(torch.exp(log_p) * log_p).sum(-1))
    return torch.cat(found).mean()


def token_log_probs(x: Tensor) -> Tensor:
    """As preference trainers write it."""
    selected = torch.gather(x, dim=-1, index=FOUND.unsqueeze(-1)).squeeze(-1)
    sums = torch.stack([torch.logsumexp(each, dim=-1) for each in x])
    return ((selected - sums) * ROWS).sum(-1).mean()


THEIRS, OURS = nn.CrossEntropyLoss(label_smoothing=0.2), fusedloss.nn.CrossEntropyLoss()
FUSED: dict[str, Step] = {
    "shifted": lambda x: F.cross_entropy(
        x[..., :-1, :].contiguous().view(-1, C), LABELS[..., 1:].reshape(-1)
    ),
    "wide": lambda x: of_tokens(x.to(torch.float64).double()),
    "weight": lambda x: of_tokens(x, weight=WEIGHT),
    "smoothing": lambda x: F.cross_entropy(
        x.mT, FOUND, label_smoothing=0.1, weight=WEIGHT, ignore_index=int(FOUND[0, 0])
    ),
    "sum": lambda x: of_tokens(x, reduction="sum"),
    "none": lambda x: of_tokens(x, reduction="none").square().sum(),
    "module": lambda x: THEIRS(x.flatten(0, 1), LABELS.flatten()),
    "own function": lambda x: fusedloss.cross_entropy(x.transpose(1, 2), LABELS),
    "own module": lambda x: OURS(x.permute(0, 2, 1), LABELS),
    "positions": lambda x: F.cross_entropy(x.mT.unflatten(2, (1, T)), LABELS.unsqueeze(1)),
    "positions moved": lambda x: F.cross_entropy(x.movedim(-1, 1), LABELS, weight=WEIGHT),
    "probabilities": lambda x: F.cross_entropy(
        x.view(-1, C), SOFT.view(-1, C), label_smoothing=0.1
    ),
    "probabilities of positions": lambda x: F.cross_entropy(x.mT, SOFT.mT, weight=WEIGHT),
    "a row": lambda x: F.cross_entropy(x[0, 0], FOUND[0, 0]),
    "a mask of rows": lambda x: F.cross_entropy(x[ROWS], LABELS[ROWS]),
    "rows by index": lambda x: F.cross_entropy(x[[0, 2]][:, 1], FOUND[[0, 2]][:, 1]),
    "rows by tensors": lambda x: F.cross_entropy(
        x[torch.tensor([0, 1]), torch.tensor([3, 4])], FOUND[[0, 1], [3, 4]]
    ),
    "index_select": lambda x: F.cross_entropy(
        x.index_select(1, torch.tensor([1, 4])).reshape(-1, C), FOUND[:, [1, 4]].reshape(-1)
    ),
    "new dimensions": lambda x: F.cross_entropy(
        x[None, :, 1:3].squeeze(0).unsqueeze(1).reshape(-1, C), FOUND[:, 1:3].reshape(-1)
    ),
    "narrow and select": lambda x: F.cross_entropy(x.narrow(1, 2, 3).select(1, -1), FOUND[:, 4]),
    "chunks": lambda x: sum(  # type: ignore[arg-type, return-value]
        F.cross_entropy(a.flatten(0, 1), b.flatten())
        for a, b in zip(x.chunk(2, dim=1), LABELS.chunk(2, dim=1), strict=True)
    ),
    "scaled": lambda x: of_tokens(2 * (x / 3.0) * 0.7),
    "soft cap": lambda x: of_tokens(torch.tanh(x / 3.0) * 3.0),
    "soft cap, scaled": lambda x: of_tokens((x * 0.5).tanh().mul(4).div(2)),
    "bias of classes": lambda x: of_tokens((x + WEIGHT) * 0.5 - WEIGHT.view(1, 1, C)),
    "mask of classes": lambda x: of_tokens(x.masked_fill(MASK, float("-inf"))),
    "mask added": lambda x: of_tokens(x + torch.zeros(C).masked_fill(MASK, -torch.inf).double()),
    "fewer classes": lambda x: F.cross_entropy(
        x[..., : C - 2].flatten(0, 1), FOUND.flatten().clamp(max=40)
    ),
    "log_softmax, gather": lambda x: (
        x.log_softmax(-1).gather(-1, FOUND.unsqueeze(-1)).squeeze(-1)[ROWS].mean()
    ),
    "log_softmax, nll": lambda x: F.nll_loss(
        F.log_softmax(x, -1).view(-1, C), LABELS.view(-1), WEIGHT
    ),
    "softmax, log": lambda x: F.nll_loss(x.softmax(-1).log().mT, LABELS),
    "softmax, gather": lambda x: torch.softmax(x, -1).gather(-1, FOUND.unsqueeze(-1)).sum(),
    "logsumexp": lambda x: torch.logsumexp(x, -1).square().mean(),
    "z loss": lambda x: of_tokens(x) + 1e-2 * x.logsumexp(-1, keepdim=True).square().mean(),
    "entropy": lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "entropy by logsumexp": lambda x: (
        torch.logsumexp(x, -1) - torch.sum(F.softmax(x, -1) * x, dim=-1)
    ).mean(),
    "entropy in chunks": entropy_in_chunks,
    "smoothed by a trainer": smoothed,
    "of tokens by a trainer": token_log_probs,
    "mean over classes": lambda x: x.log_softmax(-1).mean(-1).sum(),
    "few logits": lambda x: x.gather(-1, torch.stack([FOUND, 0 * FOUND], -1)).square().sum(),
    "kl_div": lambda x: F.kl_div(F.log_softmax(x / 2, -1), SOFT, reduction="batchmean") * 4,
    "kl_div, log_target": lambda x: F.kl_div(x.log_softmax(-1), SOFT.log(), log_target=True),
    "max": lambda x: x.max(-1).values.sum() + x.topk(3).values.sum(),
    "detached": lambda x: of_tokens(x) + (x.detach().argmax(-1) == LABELS).double().mean(),
    "twice": lambda x: of_tokens(x) + 0.1 * x[:, 0].logsumexp(-1).sum(),
}
IN_FULL: dict[str, Step] = {
    "sin": lambda x: x.sin().sum(),
    "class": lambda x: x[..., 3].sum(),
    "flat": lambda x: x.view(-1).square().sum(),
    "mask of positions": lambda x: of_tokens(x.masked_fill(~ROWS.unsqueeze(-1), 0.0)),
    "negative scale": lambda x: of_tokens(-x),
    "scale of rows": lambda x: of_tokens(x / torch.arange(1.0, T + 1).view(T, 1)),
    "bias of rows": lambda x: of_tokens(x + torch.arange(1.0, T + 1).view(T, 1).double()),
    "softmax of rows": lambda x: x.softmax(0).square().sum(),
    "in place": lambda x: of_tokens(x.mul_(0.5).add_(WEIGHT)),
    "in place, seen by a view": lambda x: (x[:, 1:], x.mul_(0.5))[0].square().sum(),
    "in place, not seen by a copy": lambda x: ((y := x * 2), x.mul_(0.5), of_tokens(y))[2],
    "set": lambda x: (x.__setitem__((..., slice(3)), 0.0), of_tokens(x))[1],
    "two of them": lambda x: (
        (x * x).sum() + torch.cat([x, x]).sum() + (x - x.detach()).square().sum()
    ),
    "matmul": lambda x: (x @ SOFT.mT).sum(),
    "half in full": lambda x: of_tokens(x) + x.sigmoid().mean(),
    "all": lambda x: x.sum() + x.log_softmax(-1).sum() + x.mean() + x.logsumexp((1, 2)).sum(),
    "hook": lambda x: (x.register_hook(lambda g: 2 * g), of_tokens(x))[1],
}


def gradients(model: Model, step: Step) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = step(model(TOKENS))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def times_computed() -> int:
    return trace.calls()[("lazy_head", "formula")]


def check(model: Model, step: Step, most: int) -> int:
    expected, grads = gradients(model, step)
    before = times_computed()
    with lazy_heads(model, min_bytes=0):
        assert type(model(TOKENS)) is LazyLogits
        found, lazy_grads = gradients(model, step)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lazy_grads, grads, rtol=1e-9, atol=1e-12)
    computed = times_computed() - before
    assert computed <= most
    return computed


@pytest.mark.parametrize("name", FUSED)
def test_needs_no_logits(model: Model, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LazyLogitsWarning)
        check(model, FUSED[name], 0)


@pytest.mark.parametrize("name", IN_FULL)
def test_computes_the_logits_once(model: Model, name: str) -> None:
    with pytest.warns(
        LazyLogitsWarning, match=r"logits of shape \[3, 7, 50\] were computed in full, for \w+"
    ):
        assert check(model, IN_FULL[name], 1) == 1


def test_the_warning_names_the_callers_line(model: Model) -> None:
    with (
        lazy_heads(model, min_bytes=0),
        pytest.warns(LazyLogitsWarning, match="for cos needs") as told,
    ):
        model(TOKENS).cos()
    assert told[0].filename == __file__


def test_metadata_computes_nothing(model: Model) -> None:
    plain = model(TOKENS)
    before = times_computed()
    with lazy_heads(model, min_bytes=0):
        x = model(TOKENS)
        assert (x.shape, x.dtype, x.device, x.ndim) == (plain.shape, plain.dtype, plain.device, 3)
        assert (x.size(-1), len(x), x.numel(), x.dim()) == (C, N, N * T * C, 3)
        assert (x.stride(), x.is_contiguous(), x[:, 1:].stride()) == (
            plain.stride(),
            True,
            plain.stride(),
        )
        assert (
            x.requires_grad
            and not x.is_leaf
            and x.grad_fn is not None
            and not x.detach().requires_grad
        )
        assert (
            repr(x)
            == "LazyLogits(logits of shape [3, 7, 50], torch.float64, not computed)"
            == f"{x}"
        )
        assert isinstance(x, Tensor) and x.is_floating_point() and not x.is_cuda
        assert x.new_zeros(3).dtype is torch.float64 and type(x.new_zeros(3)) is Tensor
        assert x[0].shape == (T, C) and x.transpose(1, 2).shape == (N, C, T)
    assert times_computed() == before


def test_best_classes(model: Model) -> None:
    plain = model(TOKENS)
    with lazy_heads(model, min_bytes=0), warnings.catch_warnings():
        warnings.simplefilter("error")
        x = model(TOKENS)
        assert torch.equal(x.argmax(-1), plain.argmax(-1))
        assert torch.equal(x.mT.argmax(1, keepdim=True), plain.mT.argmax(1, keepdim=True))
        assert torch.equal(x.log_softmax(-1).argmax(dim=-1), plain.argmax(-1))
        for found, expected in ((x.topk(4), plain.topk(4)), (x.max(-1), plain.max(-1))):
            assert torch.equal(found.indices, expected.indices)
            torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-12)


def test_two_lazy_heads(model: Model) -> None:
    torch.manual_seed(5)
    teacher = Model().double()
    teacher.requires_grad_(False)

    def loss(student: Tensor, other: Tensor) -> Tensor:
        return F.kl_div(
            F.log_softmax(student / 2, -1), F.softmax(other / 2, -1), reduction="batchmean"
        )

    expected, grads = gradients(model, lambda x: loss(x, teacher(TOKENS)))
    with lazy_heads(teacher, always=True, min_bytes=0), lazy_heads(model, min_bytes=0):
        assert type(teacher(TOKENS)) is LazyLogits
        before = times_computed()
        found, lazy_grads = gradients(model, lambda x: loss(x, teacher(TOKENS)))
        assert times_computed() == before
    torch.testing.assert_close((found, lazy_grads), (expected, grads), rtol=1e-9, atol=1e-12)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * incoming


def test_functions_in_c_get_values_and_give_gradients(model: Model) -> None:
    with pytest.warns(LazyLogitsWarning):
        check(model, lambda x: Square.apply(x[:, 1:].mT).sum(), 1)


@pytest.mark.parametrize("name", ["shifted", "soft cap", "log_softmax, gather", "entropy"])
def test_second_derivatives(model: Model, name: str) -> None:
    def second(of: Model) -> list[Tensor]:
        parameters = list(of.parameters())
        grads = torch.autograd.grad(FUSED[name](of(TOKENS)), parameters, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), parameters))  # type: ignore[arg-type]

    expected = second(model)
    with lazy_heads(model, min_bytes=0):
        torch.testing.assert_close(second(model), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("frozen", ["lm_head", "embedding", "layer"])
def test_frozen_parts(model: Model, frozen: str) -> None:
    getattr(model, frozen).requires_grad_(False)
    check(model, FUSED["shifted"], 0)


def test_a_scale_that_learns(model: Model) -> None:
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def gradient(x: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(of_tokens(x * scale) + of_tokens(x / scale), scale)
        return found

    expected = gradient(model(TOKENS))
    with lazy_heads(model, min_bytes=0), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(gradient(model(TOKENS)), expected, rtol=1e-9, atol=1e-12)


def test_checkpointed(model: Model) -> None:
    from torch.utils.checkpoint import checkpoint

    def loss(tokens: Tensor) -> Tensor:
        return FUSED["shifted"](model(tokens))

    expected, grads = gradients(model, FUSED["shifted"])
    with lazy_heads(model, min_bytes=0):
        model.zero_grad()
        found = checkpoint(loss, TOKENS, use_reentrant=False)
        found.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(found.detach(), expected)  # type: ignore[union-attr]
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=1e-9, atol=1e-12)


def test_autocast_rounds_where_the_head_would() -> None:
    torch.manual_seed(0)
    model = Model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(TOKENS)
        expected = of_tokens(plain)
        with lazy_heads(model, min_bytes=0):
            x = model(TOKENS)
            found = of_tokens(x)
            assert (x.dtype, found.dtype) == (plain.dtype, expected.dtype)
            with pytest.warns(LazyLogitsWarning):
                assert torch.equal(x.float() + 0, plain.float())
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    found.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_widens_a_class_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, weight = Model(), WEIGHT.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = of_tokens(model(TOKENS), weight=weight)
        with lazy_heads(model, min_bytes=0):
            for _ in range(2):
                found = of_tokens(model(TOKENS), weight=weight)
                assert found.dtype is expected.dtype
                torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_bfloat16_logits_made_float_give_a_float_loss() -> None:
    torch.manual_seed(0)
    model = Model().bfloat16()
    exact = copy.deepcopy(model).double()
    with lazy_heads(model, min_bytes=0):
        loss = of_tokens(model(TOKENS).float())
    assert loss.dtype is torch.float32
    with torch.no_grad():
        hidden = torch.tanh(model.layer(model.embedding(TOKENS))).double()
        expected = of_tokens(exact.lm_head(hidden))
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)


class Adapted(nn.Module):
    """A head and its low-rank adapter, as PEFT makes one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(D, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, C, bias=False)})

    def forward(self, input: Tensor) -> Tensor:
        adapter = self.lora_B["default"](self.lora_A["default"](input))
        return self.base_layer(input) + adapter * 0.5  # type: ignore[no-any-return]


def test_an_adapter_is_a_part_of_the_product(model: Model) -> None:
    model.lm_head = Adapted(model.lm_head).double()  # type: ignore[assignment]
    model.lm_head.base_layer.requires_grad_(False)  # type: ignore[union-attr]
    expected, grads = gradients(model, FUSED["shifted"])
    before = times_computed()
    with lazy_heads(model, "lm_head", min_bytes=0) as handle:
        assert handle.heads == ("lm_head.base_layer", "lm_head.lora_B.default")
        found, lazy_grads = gradients(model, FUSED["shifted"])
    assert times_computed() == before
    torch.testing.assert_close((found, lazy_grads), (expected, grads), rtol=1e-9, atol=1e-12)


def test_a_loss_like_an_earlier_one_is_not_checked_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are looked at each time; another type, scale or setting is another loss."""

    def results(weight: Tensor) -> list[Tensor]:
        found = []
        for x in (model(TOKENS), model(TOKENS) / 2, model(TOKENS).float()):
            found += [of_tokens(x), of_tokens(x, weight=weight.to(x.dtype))]
            found += [of_tokens(x, label_smoothing=0.1), of_tokens(x, reduction="none")]
        return found

    with lazy_heads(model, min_bytes=0):
        results(WEIGHT)
        model.lm_head.weight.data.mul_(2)
        monkeypatch.setattr(heads, "results", lambda *_: pytest.fail("it was checked"))
        found = results(WEIGHT.flip(0))
    for a, b in zip(found, results(WEIGHT.flip(0)), strict=True):
        torch.testing.assert_close(a, b)
