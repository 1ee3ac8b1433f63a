"""docs/distributed.md: every block of code runs, on two processes, and what it asserts holds."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import elsewhere
import pytest
import torch

from distributed import ranks

PAGE = elsewhere.ROOT / "docs/distributed.md"
BLOCK = re.compile(r"(?<=^```python\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)


def blocks() -> list[str]:
    return BLOCK.findall(PAGE.read_text())


@functools.cache
def heads() -> list[str]:
    """The heading that each block is below."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    named = zip(["", *parts[1::2]], parts[::2], strict=True)
    return [name for name, text in named for _ in BLOCK.findall(text)]


def run_all(rank: int) -> list[str]:
    """One session, as a reader copies it: what went wrong in each block."""
    known: dict[str, Any] = {"__name__": "__main__"}
    wrong = []
    for name, block in zip(heads(), blocks(), strict=True):
        try:
            exec(compile(block, f"<{name}>", "exec"), known)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            break  # the other processes wait for what this one left out
    return wrong


def test_every_block_runs() -> None:
    assert len(blocks()) >= 8
    for wrong in ranks.run(2, run_all):
        assert not wrong


def session(name: str) -> dict[str, Any]:
    """The blocks below a heading, and the first one without a process group."""
    first, *_ = blocks()
    known: dict[str, Any] = {"__name__": "__main__"}
    exec(first.split("\n\n")[0].replace("if not", "#"), known)
    for head, block in zip(heads(), blocks(), strict=True):
        if head == name:
            exec(block, known)
    return known


def test_torchtitan() -> None:
    """Against what its own losses do: the sum over the number of tokens."""
    known = session("torchtitan")
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, -100])
    total = torch.nn.functional.cross_entropy(x, y, reduction="sum")
    for tokens, want in ((None, total), (torch.tensor(9), total / 9)):
        loss, metrics = known["Loss"]()(x, y, tokens)
        torch.testing.assert_close(loss, want)
        assert metrics == {}
    fused, head = known["HeadLoss"](), torch.nn.Linear(5, 5, bias=False).double()
    fused.set_lm_head(head)
    loss, _ = fused(x, y, torch.tensor(9))
    want = torch.nn.functional.cross_entropy(head(x), y, reduction="sum") / 9
    torch.testing.assert_close(loss, want)


def test_trainer() -> None:
    """Against the Trainer's own: the sum over the number of items, an integer tensor."""
    loss_of = session("The Trainer of transformers")["loss_of"]
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -100, 2], [3, -100, -100, 4]])
    outputs = SimpleNamespace(logits=logits)
    flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(*flat, reduction="sum")
    torch.testing.assert_close(loss_of(outputs, labels, torch.tensor(8)), total / 8)
    torch.testing.assert_close(loss_of(outputs, labels, 8), total / 8)
    torch.testing.assert_close(loss_of(outputs, labels), torch.nn.functional.cross_entropy(*flat))


@pytest.mark.slow
def test_trainer_that_trains(tmp_path: Any) -> None:
    """Two steps of an accumulation of unequal counts are one step of all rows."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    loss_of = session("The Trainer of transformers")["loss_of"]
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    rows = torch.randint(20, (4, 6))
    labels = rows.masked_fill(torch.rand(4, 6) < torch.tensor([[0.9], [0.1], [0.5], [0.0]]), -100)
    data = [{"input_ids": i, "labels": y} for i, y in zip(rows, labels, strict=True)]
    want = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits = torch.func.functional_call(model, want, (rows,)).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(want.values()))
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        report_to=[],
        use_cpu=True,
        max_grad_norm=0.0,
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = transformers.Trainer(model, settings, train_dataset=data, compute_loss_func=loss_of)
    trainer.train()
    for (n, p), g in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(before[n] - p.detach(), g, rtol=1e-6, atol=1e-9, msg=n)
