"""How much of the logits of a head is there at a time, and who takes the step over their rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...core import errors
from ...core.reduce import wide
from ...kinds.heads import LinearCall
from .. import gpu
from .products import HALVES, TILE_BYTES, multiplies

BUDGET = 64 << 20
BUDGET_OF_SHARD = 16 << 20  # beside the gradients of a shard these are as little as before
LEAST_ON_GPU, MOST_ON_GPU = 256 << 20, 1 << 30  # smaller products leave a GPU idle
FORWARD_BUDGET = 10 << 20  # with what a matrix product takes itself, 16 MiB
FORWARD_ROWS = 512
ALIGNED = 16  # rows; odd numbers slow the products down
# Logits larger than this, in rows where one is, are taken exactly where the products round them.
ORDINARY = 8.0
AGAIN = 4  # as many parts of a chunk have their logits exactly, one after another


class Plan(NamedTuple):
    """How much of the logits is there at a time."""

    rows: int
    classes: int


def plan(call: LinearCall, input: Tensor, classes: int, differentiate: bool) -> Plan:
    """Chunks within the budget. ValueError where not even one row fits."""
    n, features = input.shape
    half, triton = input.dtype in HALVES, takes_triton(call, input)
    computed = size = wide(input).itemsize  # of logits
    if input.is_cuda and triton and not (half and call.exact_logits):
        size = input.element_size()
    elif differentiate and rounded(input):
        # Of two heads' shards, what rounding took from logits stays beside them.
        again = 1 if call.shard and call.logits > 1 else AGAIN // 2
        size = input.element_size() + input.element_size() // again
    # Beside the logits: the row itself, its gradient, and a few numbers of it.
    per_row = size * call.logits * classes + 2 * computed * features + 128
    fixed = TILE_BYTES if half and not input.is_cuda else 0
    half_a_gradient = computed * classes * features // 2
    on_cpu = BUDGET if call.shard is None else BUDGET_OF_SHARD
    default = min(max(half_a_gradient, LEAST_ON_GPU), MOST_ON_GPU) if input.is_cuda else on_cpu
    budget = call.memory_budget or default
    if budget < per_row + fixed:
        errors.fail(
            ValueError,
            call.loss,
            f"memory_budget = {budget} bytes does not hold one row of {classes} classes and "
            f"{features} features: the least is {per_row + fixed}",
        )
    if differentiate or not on_host(input) or call.logits > 1:
        # Where there is no kernel, torch operations take copies of the logits.
        per_row *= 1 if on_host(input) or triton else 6
        # An eighth is for what the matrix products take themselves.
        most, width = (budget * 7 // 8 - fixed) // per_row, classes
    else:
        budget = min(budget, FORWARD_BUDGET) - fixed
        most = min(FORWARD_ROWS, max(1, budget // (size * (64 + 2 * features) + 128)))
        most = most if most <= ALIGNED else most // ALIGNED * ALIGNED
        width = (budget - most * (2 * size * features + 128)) // (size * most)
        width = min(classes, max(64, width // 64 * 64))
    most = max(1, min(most, call.chunk_rows or n, n))
    rows = -(-max(n, 1) // max(1, -(-n // most)))  # all chunks alike
    aligned = -(-rows // ALIGNED) * ALIGNED
    return Plan(aligned if aligned <= most else rows, width)


def on_host(input: Tensor) -> bool:
    """Whether the row steps are those of the C++ core."""
    return input.is_cpu and not gpu.serves(input)


def rounded(input: Tensor) -> bool:
    """Whether the products round the logits that the C++ core takes."""
    return on_host(input) and multiplies(input.dtype)


def takes_triton(call: LinearCall, input: Tensor) -> bool:
    """Whether the row steps are Triton's; elsewhere they are torch operations."""
    indices = call.family == "linear" and not (call.probabilities or call.shard)
    return indices and gpu.serves(input) and gpu.problem(call.family) is None
