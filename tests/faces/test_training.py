"""Other people's libraries, as they are, train under `fusedloss.patched()`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from patching import _restored, counted  # noqa: F401
from torch import Tensor

# Bound before any patch, as in a library that was imported earlier.
from torch.testing import assert_close

import fusedloss

os.environ["HF_HUB_OFFLINE"] = "1"


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
