"""What `fusedloss.patch()` reaches in other libraries: docs/compatibility.md's table, row by row.

A row runs where its library is installed: those in constraints.txt always.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fusedloss
from fusedloss.core import trace

os.environ["HF_HUB_OFFLINE"] = "1"

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"

Loss = Callable[[], Tensor]


class Row(NamedTuple):
    library: str  # as it is imported
    loss: str  # as the page names it
    kernels: dict[str, int]  # our functions that one call runs, and how often; none: not reached
    build: Callable[[Any], Loss]  # from the imported module


ROWS: list[Row] = []


def row(library: str, loss: str, **kernels: int) -> Callable[[Callable[[Any], Loss]], Any]:
    return lambda build: ROWS.append(Row(library, loss, kernels, build))


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def classes(*shape: int, of: int = 5) -> Tensor:
    return torch.randint(of, shape)


# PyTorch's own ways around torch.nn.functional


@row("torch", "`torch.kl_div`, `torch.triplet_margin_loss` and others below `torch.nn.functional`")
def _(_: Any) -> Loss:
    x = logits(4, 5)
    return lambda: (
        torch.kl_div(x.log_softmax(1), x.softmax(1)).sum()
        + torch.triplet_margin_loss(x, x + 1, x + 2).sum()
    )


@row("torch", "`AdaptiveLogSoftmaxWithLoss`, which computes its loss itself")
def _(_: Any) -> Loss:
    adaptive = torch.nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10])
    x, y = logits(4, 8), classes(4, of=20)
    return lambda: adaptive(x, y).loss


@row(
    "torch",
    "every other loss of `torch.nn`, such as `SmoothL1Loss`, `GaussianNLLLoss` and `CTCLoss`",
    smooth_l1_loss=1,
    gaussian_nll_loss=1,
    ctc_loss=1,
)
def _(_: Any) -> Loss:
    x, frames, labels = logits(4, 8), logits(4, 1, 8), torch.tensor([[1, 2]])
    smooth, gaussian, ctc = torch.nn.SmoothL1Loss(), torch.nn.GaussianNLLLoss(), torch.nn.CTCLoss()
    return lambda: (
        smooth(x, x + 1)
        + gaussian(x, x + 1, torch.ones(4, 8))
        + ctc(frames.log_softmax(2), labels, torch.tensor([4]), torch.tensor([2]))
    )


# transformers


@row("transformers.loss.loss_utils", "causal language models", cross_entropy=1)
def _(losses: Any) -> Loss:
    x, labels = logits(2, 6, 11), classes(2, 6, of=11)
    return lambda: losses.ForCausalLMLoss(x, labels, vocab_size=11)


@row("transformers.loss.loss_utils", "masked language models", cross_entropy=1)
def _(losses: Any) -> Loss:
    x, labels = logits(2, 6, 11), classes(2, 6, of=11)
    return lambda: losses.ForMaskedLMLoss(x, labels, vocab_size=11)


@row(
    "transformers.loss.loss_utils",
    "sequence classification: one label, several, regression",
    cross_entropy=1,
    binary_cross_entropy_with_logits=1,
    mse_loss=1,
)
def _(losses: Any) -> Loss:
    from transformers import PretrainedConfig

    x, labels = logits(4, 3), classes(4, of=3)
    several = torch.rand(4, 3)

    def loss() -> Tensor:
        total = torch.zeros(())
        for problem, target in (
            ("single_label_classification", labels),
            ("multi_label_classification", several),
            ("regression", several),
        ):
            config = PretrainedConfig(num_labels=3)
            config.problem_type = problem
            total = total + losses.ForSequenceClassificationLoss(target, x, config)
        return total

    return loss


@row("transformers.trainer_pt_utils", "`label_smoothing_factor` of the Trainer (`LabelSmoother`)")
def _(utils: Any) -> Loss:
    x, labels = logits(2, 6, 11), classes(2, 6, of=11)
    return lambda: utils.LabelSmoother()({"logits": x}, labels)


@row("trl.trainer.utils", "log-probabilities of the trainers (`selective_log_softmax`)")
def _(utils: Any) -> Loss:
    x, labels = logits(2, 6, 11), classes(2, 6, of=11)
    return lambda: utils.selective_log_softmax(x, labels).sum()


@row("trl.trainer.utils", "`SFTTrainer`: head and loss in one, of its own")
def _(utils: Any) -> Loss:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    utils.add_fused_lm_head(model)
    ids = classes(2, 8, of=97)
    return lambda: model(input_ids=ids, labels=ids, fused_lm_head=True).loss


# pytorch-metric-learning


def metric_row(names: str, **kernels: int) -> None:
    @row("pytorch_metric_learning.losses", names, **kernels)
    def _(losses: Any) -> Loss:
        x, labels = logits(12, 8), torch.arange(12) % 4
        heads = []
        for name in re.findall(r"`(\w+)`", names):
            try:
                heads.append(getattr(losses, name)(num_classes=4, embedding_size=8))
            except TypeError:
                heads.append(getattr(losses, name)())
        return lambda: sum((head(x, labels) for head in heads), torch.zeros(()))


metric_row(
    "`ArcFaceLoss`, `CosFaceLoss`, `NormalizedSoftmaxLoss`, `SoftTripleLoss`", cross_entropy=4
)
metric_row("`NPairsLoss`", cross_entropy=1)
metric_row("`TripletMarginLoss`, `NTXentLoss`, `SupConLoss`, `ContrastiveLoss`")


# sentence-transformers

SENTENCE = "sentence_transformers.sentence_transformer.losses"


def sentence_row(name: str, embeddings: int, labels: Callable[[], Tensor], **kernels: int) -> None:
    @row(SENTENCE, f"`{name}`", **kernels)
    def _(losses: Any) -> Loss:
        loss, drawn = getattr(losses, name)(torch.nn.Identity()), labels()
        features = [logits(6, 8) for _ in range(embeddings)]
        return lambda: loss.compute_loss_from_embeddings(features, drawn)


def scores() -> Tensor:
    return torch.rand(6)


sentence_row("CosineSimilarityLoss", 2, scores, mse_loss=1)
sentence_row("MarginMSELoss", 3, scores, mse_loss=1)
sentence_row("DistillKLDivLoss", 3, lambda: torch.rand(6, 2), kl_div=1)
sentence_row("MultipleNegativesRankingLoss", 3, scores)
sentence_row("CoSENTLoss", 2, scores)
sentence_row("TripletLoss", 3, scores)


# timm


def timm_row(name: str, target: Callable[[], Tensor], batch: int = 6, **kernels: int) -> None:
    @row("timm.loss", f"`{name}`", **kernels)
    def _(losses: Any) -> Loss:
        x, drawn = logits(batch, 5), target()
        return lambda: getattr(losses, name)()(x, drawn)


timm_row("BinaryCrossEntropy", lambda: classes(6), binary_cross_entropy_with_logits=1)
timm_row("JsdCrossEntropy", lambda: classes(2), kl_div=3)
timm_row("LabelSmoothingCrossEntropy", lambda: classes(6))
timm_row("SoftTargetCrossEntropy", lambda: torch.rand(6, 5))


# Segmentation


@row("monai.losses", "`DiceCELoss`", cross_entropy=1)
def _(losses: Any) -> Loss:
    x, target = logits(2, 3, 4, 4), classes(2, 1, 4, 4, of=3)
    return lambda: losses.DiceCELoss(softmax=True, to_onehot_y=True)(x, target)


@row("monai.losses", "`FocalLoss`, `DiceLoss`")
def _(losses: Any) -> Loss:
    x, target = logits(2, 3, 4, 4), classes(2, 1, 4, 4, of=3)
    return lambda: (
        losses.FocalLoss(to_onehot_y=True)(x, target)
        + losses.DiceLoss(softmax=True, to_onehot_y=True)(x, target)
    )


@row(
    "segmentation_models_pytorch.losses",
    "`SoftBCEWithLogitsLoss`, `FocalLoss`",
    binary_cross_entropy_with_logits=2,
)
def _(losses: Any) -> Loss:
    x, target = logits(2, 1, 4, 4), classes(2, 1, 4, 4, of=2).float()
    return lambda: losses.SoftBCEWithLogitsLoss()(x, target) + losses.FocalLoss("binary")(x, target)


@row("segmentation_models_pytorch.losses", "`SoftCrossEntropyLoss`, `DiceLoss`")
def _(losses: Any) -> Loss:
    x, target = logits(2, 3, 4, 4), classes(2, 4, 4, of=3)
    soft = losses.SoftCrossEntropyLoss(smooth_factor=0.1)
    return lambda: soft(x, target) + losses.DiceLoss("multiclass")(x, target)


def once(build: Callable[[Any], Loss], module: Any) -> tuple[float, Counter[tuple[str, str]]]:
    """The loss, backward too, and the calls of ours that it took."""
    torch.manual_seed(0)
    loss = build(module)
    before = trace.calls()
    value = loss()
    value.backward()
    return value.item(), trace.calls() - before


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.library}-{row.loss[:40]}")
def test_what_patch_reaches(row: Row) -> None:
    # timm needs torchvision, which raises RuntimeError beside a torch that it was not built for.
    module = pytest.importorskip(row.library, exc_type=(ImportError, RuntimeError))
    expected, calls = once(row.build, module)
    assert not calls
    with fusedloss.patched():
        value, calls = once(row.build, module)
    assert calls == {(name, "kernel"): count for name, count in row.kernels.items()}
    assert_close(value, expected, rtol=1e-5, atol=1e-6)


def table() -> str:
    lines = ["| library | loss | ours that run |", "|---|---|---|"]
    for row in ROWS:
        runs = ", ".join(f"`{name}`" for name in row.kernels) or "-"
        library = row.library.split(".")[0].replace("_", "-")
        lines.append(f"| {library} | {row.loss} | {runs} |")
    return "\n".join(lines)


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text(), table()
