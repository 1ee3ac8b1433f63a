"""Trainers that nobody edits, with lazy heads: the same losses, step by step, and no logits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from fusedloss import LazyLogits, lazy_heads, patched
from fusedloss.core import trace

CLASSES = 199


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=CLASSES,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Of uneven batches: each row has its own number of ignored labels."""

    def __len__(self) -> int:
        return 14

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        tokens = torch.randint(3, CLASSES, (12,), generator=torch.Generator().manual_seed(k))
        labels = tokens.clone()
        labels[: k % 5] = -100
        return {"input_ids": tokens, "labels": labels}


def same(run: Callable[[bool], list[float]], within: float) -> None:
    """The losses of a run with lazy heads, in which none was computed, are those of a run without."""
    expected, before = run(False), trace.calls()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = run(True)
    calls = trace.calls() - before
    assert calls[("lazy_head", "formula")] == 0 < calls.total()
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        ({}, 1e-4),
        ({"label_smoothing_factor": 0.1}, 1e-3),
        ({"gradient_accumulation_steps": 2}, 1e-4),
        ({"gradient_checkpointing": True}, 1e-4),
        ({"bf16": True}, 2e-2),
    ],
    ids=["plain", "smoothing", "accumulation", "checkpointing", "bf16"],
)
def test_transformers_trainer(settings: dict[str, Any], within: float, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def run(lazily: bool) -> list[float]:
        model = llama()
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_train_epochs=2,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        trainer = Trainer(model, arguments, train_dataset=Tokens(), eval_dataset=Tokens())
        if lazily:
            lazy_heads(model, min_bytes=0)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*losses, trainer.evaluate()["eval_loss"]]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(run, within)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 16)
        self.layer = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, CLASSES, bias=False)
        self.embedding.weight = self.lm_head.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        """As nanoGPT has it."""
        x = torch.tanh(self.layer(self.embedding(tokens)))
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_lightning(precision: Any) -> None:
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kinds: set[type[Any]] = set()

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.seen = Net(), []

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            logits, loss = self.net(batch[:, :-1], batch[:, 1:].contiguous())
            kinds.add(type(logits))
            self.log("accuracy", (logits.argmax(-1) == batch[:, 1:]).float().mean())
            self.seen.append(loss.item())
            return loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.5)

    def run(lazily: bool) -> list[float]:
        module = Module()
        if lazily:
            lazy_heads(module, min_bytes=0)
        rows = torch.randint(CLASSES, (24, 10), generator=torch.Generator().manual_seed(1))
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision=precision,
            accumulate_grad_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
        return module.seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(run, 1e-3 if precision == "bf16-mixed" else 1e-5)
    assert LazyLogits in kinds


@pytest.mark.parametrize("how", ["lazy_heads", "patched"])
def test_a_loop_of_ones_own(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedloss.lazy.heads.MIN_BYTES", 0)
    rows = torch.randint(CLASSES, (6, 4, 10), generator=torch.Generator().manual_seed(1))

    def run(lazily: bool) -> list[float]:
        torch.manual_seed(0)
        model, losses = Net(), []
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if lazily and how == "lazy_heads":
            lazy_heads(model, min_bytes=0)
        for batch in rows:
            logits, loss = model(batch[:, :-1], batch[:, 1:].contiguous())
            assert (type(logits) is LazyLogits) == lazily
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            assert type(model(rows[0])[0]) is Tensor
        return losses

    def either(lazily: bool) -> list[float]:
        if lazily and how == "patched":
            with patched(heads=True):
                return run(lazily)
        return run(lazily)

    same(either, 1e-4)


@pytest.mark.parametrize("where", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft(where: list[str], saved: list[str] | None) -> None:
    peft = pytest.importorskip("peft")
    if saved and "lm_head" in where:
        pytest.skip("a head is adapted or trained, not both")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=where, modules_to_save=saved)
        model = peft.get_peft_model(llama().double(), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    tokens = torch.stack([Tokens()[k]["input_ids"] for k in range(3)])

    def run(lazily: bool) -> list[float]:
        model.zero_grad()
        with lazy_heads(model, min_bytes=0 if lazily else 1 << 40):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        grads = (p.grad.double().norm().item() for p in model.parameters() if p.grad is not None)
        return [loss.item(), *grads]

    same(run, 1e-5)
