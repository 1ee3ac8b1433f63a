"""A loss of rows that no kernel was written for: sums, a number, and a label for each row.

Dice's score of two rows: to be large where the label is above 0, and small elsewhere.
"""

from fusedloss.kinds import torch_m as m
from fusedloss.kinds.formula import Pointwise
from fusedloss.kinds.reduction import Reduction, Sums


def products(x, t):
    return x * t, x * x, t * t


def products_slope(x, t, by_dot, by_x, by_t):
    return by_dot * t + 2.0 * by_x * x, by_dot * x + 2.0 * by_t * t


def overlap(dot, xx, tt, y, *, smooth):
    score = (2.0 * dot + smooth) / (xx + tt + smooth)
    return m.where(y > 0.0, 1.0 - score, m.maximum(score, 0.0))


def overlap_grad(dot, xx, tt, y, *, smooth):
    size = xx + tt + smooth
    score = (2.0 * dot + smooth) / size
    side = m.where(y > 0.0, -1.0, m.where(score < 0.0, 0.0, 1.0)) / size
    return 2.0 * side, -side * score, -side * score


OVERLAP = Reduction(
    "overlap",
    "overlap_loss",
    Sums(products, products_slope),
    Pointwise(overlap, overlap_grad),
)
