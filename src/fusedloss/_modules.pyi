# Printed by tests/stubs.py.

from typing import Any

import torch.nn
from torch import Tensor

class AdaptiveLogSoftmaxWithLoss(torch.nn.AdaptiveLogSoftmaxWithLoss):
    def forward(self, input_: Tensor, target_: Tensor) -> Any: ...

class BCELoss(torch.nn.BCELoss):
    exact_grad: bool
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        exact_grad: bool = False,
    ) -> None: ...
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    ignore_index: int | None
    label_smoothing: float
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None: ...
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...

class CTCLoss(torch.nn.CTCLoss):
    def forward(
        self,
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Tensor,
        target_lengths: Tensor,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...

class CosineEmbeddingLoss(torch.nn.CosineEmbeddingLoss):
    def forward(
        self,
        input1: Tensor,
        input2: Tensor,
        target: Tensor,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...

class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    class_group: Any
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        class_group: Any = None,
    ) -> None: ...
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class DiceCrossEntropyLoss(torch.nn.Module):
    weight: Tensor | None
    lambda_dice: float
    lambda_ce: float
    overlap: str
    alpha: float
    beta: float
    generalized: str
    include_background: bool
    batch: bool
    smooth_nr: float
    smooth_dr: float
    skip_absent: bool
    ignore_index: int
    reduction: str
    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        overlap: str = "dice",
        alpha: float = 0.5,
        beta: float = 0.5,
        generalized: str = "none",
        include_background: bool = True,
        batch: bool = False,
        smooth_nr: float = 1e-05,
        smooth_dr: float = 1e-05,
        skip_absent: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor) -> Tensor: ...

class DiceFocalLoss(torch.nn.Module):
    weight: Tensor | None
    gamma: float
    lambda_dice: float
    lambda_focal: float
    overlap: str
    alpha: float
    beta: float
    generalized: str
    include_background: bool
    batch: bool
    smooth_nr: float
    smooth_dr: float
    skip_absent: bool
    ignore_index: int
    reduction: str
    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        gamma: float = 2.0,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        overlap: str = "dice",
        alpha: float = 0.5,
        beta: float = 0.5,
        generalized: str = "none",
        include_background: bool = True,
        batch: bool = False,
        smooth_nr: float = 1e-05,
        smooth_dr: float = 1e-05,
        skip_absent: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None: ...
    def forward(self, input: Tensor, target: Tensor) -> Tensor: ...

class DiceLoss(torch.nn.Module):
    weight: Tensor | None
    activation: str
    overlap: str
    alpha: float
    beta: float
    generalized: str
    include_background: bool
    batch: bool
    smooth_nr: float
    smooth_dr: float
    skip_absent: bool
    ignore_index: int
    reduction: str
    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        activation: str = "softmax",
        overlap: str = "dice",
        alpha: float = 0.5,
        beta: float = 0.5,
        generalized: str = "none",
        include_background: bool = True,
        batch: bool = False,
        smooth_nr: float = 1e-05,
        smooth_dr: float = 1e-05,
        skip_absent: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None: ...
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class GaussianNLLLoss(torch.nn.GaussianNLLLoss):
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        var: Tensor | float,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...

class HingeEmbeddingLoss(torch.nn.HingeEmbeddingLoss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class HuberLoss(torch.nn.HuberLoss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class KLDivLoss(torch.nn.KLDivLoss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class L1Loss(torch.nn.L1Loss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
    z_loss: float
    softcap: Tensor | float | None
    logit_scale: Tensor | float
    memory_budget: int | None
    exact_logits: bool
    class_group: Any
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        z_loss: float = 0.0,
        softcap: Tensor | float | None = None,
        logit_scale: Tensor | float = 1.0,
        memory_budget: int | None = None,
        exact_logits: bool = False,
        class_group: Any = None,
        **settings: Any,
    ) -> None: ...
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...

class MSELoss(torch.nn.MSELoss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class MarginRankingLoss(torch.nn.MarginRankingLoss):
    def forward(
        self,
        input1: Tensor,
        input2: Tensor,
        target: Tensor,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...

class MultiLabelMarginLoss(torch.nn.MultiLabelMarginLoss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class MultiLabelSoftMarginLoss(torch.nn.MultiLabelSoftMarginLoss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class MultiMarginLoss(torch.nn.MultiMarginLoss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class NLLLoss(torch.nn.NLLLoss):
    class_group: Any
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        class_group: Any = None,
    ) -> None: ...
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class PoissonNLLLoss(torch.nn.PoissonNLLLoss):
    def forward(
        self, log_input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class SigmoidFocalLoss(torch.nn.Module):
    alpha: float
    gamma: float
    reduction: str
    ignore_index: int | None
    label_smoothing: float
    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None: ...
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...

class SmoothL1Loss(torch.nn.SmoothL1Loss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class SoftMarginLoss(torch.nn.SoftMarginLoss):
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class SoftmaxFocalLoss(torch.nn.Module):
    weight: Tensor | None
    gamma: float
    ignore_index: int
    label_smoothing: float
    reduction: str
    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        gamma: float = 2.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None: ...
    def forward(
        self, input: Tensor, target: Tensor, denominator: Tensor | float | None = None
    ) -> Tensor: ...

class TripletMarginLoss(torch.nn.TripletMarginLoss):
    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...

class TripletMarginWithDistanceLoss(torch.nn.TripletMarginWithDistanceLoss):
    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        denominator: Tensor | float | None = None,
    ) -> Tensor: ...
