"""The losses, one file a family: formula, documentation, checks and registry rows."""

from .binary import binary_cross_entropy, binary_cross_entropy_with_logits
from .classification import cross_entropy, nll_loss
from .divergence import kl_div
from .heads import linear_cross_entropy, linear_kl_div, linear_log_prob
from .metric import triplet_margin_loss, triplet_margin_with_distance_loss
from .regression import mse_loss

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_prob",
    "mse_loss",
    "nll_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
]
