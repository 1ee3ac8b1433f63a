"""Lazy heads under torch.compile: one graph, in which no tensor has the logits' size."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fusedloss import LazyLogits, lazy_heads, patched
from fusedloss.lazy.tensor import TracedLogits

from .test_rules import FOUND, FUSED, TOKENS, C, Model, T, gradients, of_tokens

N = TOKENS.shape[0]


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs(model: nn.Module) -> tuple[Any, list[Any]]:
    """The model compiled, and the graphs of its forward and backward."""
    seen: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    return torch.compile(model, fullgraph=True, backend=backend), seen


class WithLoss(nn.Module):
    def __init__(self, model: Model, step: Any) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        x = self.model(tokens)
        return self.step(x), x


# What indexes by a mask has a size that no graph knows.
STEPS = [
    name
    for name in FUSED
    if name not in ("a mask of rows", "log_softmax, gather", "detached", "max")
]


@pytest.mark.parametrize("name", STEPS)
def test_one_graph_without_logits(name: str) -> None:
    torch.manual_seed(0)
    model = Model().double()
    expected, grads = gradients(model, FUSED[name])
    with lazy_heads(model, min_bytes=0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled, seen = graphs(WithLoss(model, FUSED[name]))
        model.zero_grad()
        loss, x = compiled(TOKENS)
        loss.backward()
    assert type(x) is TracedLogits and x.shape == (N, T, C)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=1e-9, atol=1e-12)
    given = {N * T * C} if "prob" in name or "kl_div" in name else set()
    assert given or not {v for g in seen for v in sizes(g)} & {N * T * C, N * (T - 1) * C}


def sizes(graph: Any) -> list[int]:
    values = (node.meta.get("val") for node in graph.graph.nodes)
    return [v.numel() for v in values if isinstance(v, Tensor)]


def check_compiled(step: Any) -> None:
    """A loss of lazy logits and its gradients, compiled, against those of logits."""
    torch.manual_seed(0)
    model = Model().double()
    expected, grads = gradients(model, step)
    with lazy_heads(model, min_bytes=0):
        model.zero_grad()
        loss, _ = torch.compile(WithLoss(model, step), fullgraph=True, backend="aot_eager")(TOKENS)
        loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)


def test_what_needs_the_numbers_gets_them() -> None:
    def step(x: Any) -> Tensor:
        return x.sin().sum() + of_tokens(x) + torch.matmul(x, torch.ones(C, 2).double()).sum()  # type: ignore[no-any-return]

    check_compiled(step)


def test_what_comes_out_is_used_like_logits() -> None:
    torch.manual_seed(0)
    model = Model().double()
    plain = model(TOKENS)
    with lazy_heads(model, min_bytes=0):
        x = torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS)
    assert type(x) is TracedLogits
    assert torch.equal(x.argmax(-1), plain.argmax(-1))
    torch.testing.assert_close(x[:, -1].softmax(-1) + 0, plain[:, -1].softmax(-1))
    torch.testing.assert_close(x + 1, plain + 1)
    torch.testing.assert_close(torch.sin(x), plain.sin())
    torch.testing.assert_close(of_tokens(x), of_tokens(plain))
    assert x.cpu() is x and x.device == plain.device and len(x) == N and x.requires_grad


def kept_without_gradient(x: Any) -> Tensor:
    with torch.no_grad():
        p = x.log_softmax(-1)
        entropy = -(x.softmax(-1) * p).sum(-1).mean()
    own = p.gather(-1, FOUND.unsqueeze(-1)) * x.log_softmax(-1).gather(-1, FOUND.unsqueeze(-1))
    return own.sum() * entropy + (x.detach().softmax(-1) * x.log_softmax(-1)).sum(-1).sum()  # type: ignore[no-any-return]


def written(x: Any) -> Tensor:
    x.mul_(0.5)
    x.clamp_(-1, 1)
    x[..., :3] = -1.0
    x /= 2
    return of_tokens(x)


@pytest.mark.parametrize("step", [kept_without_gradient, written])
def test_grad_mode_and_writes(step: Any) -> None:
    check_compiled(step)


def test_a_compiled_loss_of_what_a_head_gave() -> None:
    torch.manual_seed(0)
    model = Model().double()

    def step(x: Tensor) -> Tensor:
        return of_tokens(x.float().double() * 2) + x.logsumexp(-1).sum() + x.sin().sum()

    expected, grads = gradients(model, step)
    with lazy_heads(model, "lm_head", min_bytes=0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, lazy_grads = gradients(model, torch.compile(step, backend="aot_eager"))
    torch.testing.assert_close((found, lazy_grads), (expected, grads), rtol=1e-6, atol=1e-8)


def test_evaluation_is_compiled_as_ever() -> None:
    model = Model().eval()
    with lazy_heads(model, min_bytes=0):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert type(compiled(TOKENS)) is Tensor
        with torch.no_grad():
            assert type(compiled(TOKENS)) is Tensor
        model.train()
        assert type(compiled(TOKENS)) is TracedLogits
    assert type(model(TOKENS)) is Tensor


def test_a_compiled_trunk_and_a_called_head() -> None:
    torch.manual_seed(0)
    model = Model().double()
    expected, grads = gradients(model, FUSED["shifted"])
    model.layer = torch.compile(model.layer, backend="aot_eager")
    with lazy_heads(model, "lm_head", min_bytes=0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo looks at the .grad of what comes in
        assert type(model(TOKENS)) is LazyLogits
        found, lazy_grads = gradients(model, FUSED["shifted"])
    torch.testing.assert_close((found, lazy_grads), (expected, grads), rtol=1e-9, atol=1e-12)


SCRIPT = """
import torch
from torch.nn import functional as F
from fusedloss import lazy_heads
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(300, 16), torch.nn.Tanh(), torch.nn.Linear(16, 300))
tokens = torch.arange(40).view(4, 10)
def step(tokens):
    x = model(tokens).float()
    return F.cross_entropy(x[:, :-1].reshape(-1, 300), tokens[:, 1:].reshape(-1))
expected = torch.autograd.grad(step(tokens), list(model.parameters()))
with lazy_heads(model, "2", min_bytes=0):
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(tokens), list(model.parameters()))
torch.testing.assert_close(found, expected)
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"])
"""


def test_inductor_and_its_cache_across_processes(tmp_path: Any) -> None:
    import os

    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        hits.append(int(done.stdout))
    assert hits[0] == 0 < hits[1]


def test_patched_heads_compile() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9000, 8), nn.Tanh(), nn.Linear(8, 9000)).double()
    tokens = torch.arange(64).view(2, 32)

    def step(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).view(-1, 9000), tokens.view(-1))

    expected = torch.autograd.grad(step(tokens), list(model.parameters()))
    with patched(heads=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(tokens), list(model.parameters()))
        assert type(model(tokens)) is LazyLogits
    assert type(model(tokens)) is Tensor
    torch.testing.assert_close(found, expected)


def test_a_product_whose_order_is_lost_is_refused() -> None:
    model = Model().double()
    with lazy_heads(model, min_bytes=0):
        compiled = torch.compile(
            lambda tokens: model(tokens) @ torch.ones(C, 2).double(),
            fullgraph=True,
            backend="eager",
        )
        with pytest.raises(Exception, match=r"use torch.matmul\(logits, other\)"):
            compiled(TOKENS)
