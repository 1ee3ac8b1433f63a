# Printed by tests/stubs.py.

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

from .losses.heads import LogProb

def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    exact_grad: bool = False,
) -> Tensor: ...
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor: ...
def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    class_group: Any = None,
) -> Tensor: ...
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor: ...
def dice_cross_entropy(
    input: Tensor,
    target: Tensor,
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
) -> Tensor: ...
def dice_focal(
    input: Tensor,
    target: Tensor,
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
) -> Tensor: ...
def dice_loss(
    input: Tensor,
    target: Tensor,
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
) -> Tensor: ...
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-06,
    reduction: str = "mean",
) -> Tensor: ...
def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor: ...
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor: ...
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: Tensor | float | None = None,
    logit_scale: Tensor | float = 1.0,
    denominator: Tensor | float | None = None,
    memory_budget: int | None = None,
    exact_logits: bool = False,
    class_group: Any = None,
) -> Tensor: ...
def linear_kl_div(
    input: Tensor,
    linear_weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    target: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    softcap: Tensor | float | None = None,
    teacher_softcap: float | None = None,
    denominator: Tensor | float | None = None,
    memory_budget: int | None = None,
    exact_logits: bool = False,
    class_group: Any = None,
) -> Tensor: ...
@overload
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    temperature: Tensor | float = 1.0,
    softcap: Tensor | float | None = None,
    statistics: Literal[False] = False,
    memory_budget: int | None = None,
    exact_logits: bool = False,
    class_group: Any = None,
) -> Tensor: ...
@overload
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    temperature: Tensor | float = 1.0,
    softcap: Tensor | float | None = None,
    statistics: Literal[True],
    memory_budget: int | None = None,
    exact_logits: bool = False,
    class_group: Any = None,
) -> LogProb: ...
@overload
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    temperature: Tensor | float = 1.0,
    softcap: Tensor | float | None = None,
    statistics: bool,
    memory_budget: int | None = None,
    exact_logits: bool = False,
    class_group: Any = None,
) -> Tensor | LogProb: ...
def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor: ...
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-08,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor: ...
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor: ...
def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor: ...
def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-06,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor: ...
def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Tensor: ...
