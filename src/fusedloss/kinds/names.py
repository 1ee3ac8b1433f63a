"""What formulas are written with: the names of the namespace `m`, the operators, and the limits.

The printer reads this at build time, without torch. A function stands once more in each of `torch_m.py`,
`csrc/math.h` with `avx512.h`, `engines/gpu/m.py` and `cli/verify/exact.py`; tests/engines/test_names.py asks
all of them for each.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

OPERANDS = 4  # of a formula, at most; two at least
NUMBERS = 4
HEAD_SUMS = 8  # numbers that are gathered of a row of logits
DIVERGENCE_SUMS = 16  # of a row of two heads
STAGES = 4  # calls of a formula that get a loop of their own; further ones are made in place


class Name(NamedTuple):
    """A function of `m`."""

    arity: int
    meaning: str
    # Long chains of dependent instructions, of which a processor overlaps few: each gets a loop of its own.
    staged: bool = False
    # The largest error in ULP on the CPU, of float32 and of float64.
    bounds: tuple[float, float] | None = None


FUNCTIONS = {
    "abs": Name(1, "|a|"),
    "at_least": Name(2, "the greater of the two, whose derivative by a is 1 where that is b too"),
    "exp": Name(1, "e to the power of a", True, (0.91, 0.91)),
    "log": Name(1, "natural logarithm: -inf of 0, NaN below", True, (0.97, 0.98)),
    "log1p": Name(1, "log(1 + a), with all digits of a small a", True, (0.98, 0.98)),
    "log_or_zero": Name(1, "log(a), but 0 of 0, with finite derivatives there", True),
    # These share the stages exp(-|a|) and log(1 + exp(-|a|)), whatever the signs in the product a.
    "log_sigmoid": Name(1, "log(sigmoid(a)), with all digits in both tails", True, (1.66, 1.63)),
    "maximum": Name(2, "the greater of the two, NaN where one is; one may be a number"),
    "pow": Name(2, "a to the power of a number b, of a from 0 on: 1 where b is 0", True),
    "sigmoid": Name(1, "1 / (1 + exp(-a)), with all digits in both tails", True, (1.81, 1.81)),
    "sqrt": Name(1, "square root, rounded once: NaN below 0"),
    "where": Name(3, "of a condition: b where it holds, else c; both may be numbers"),
}
CONSTANTS = {"inf": "infinity"}

ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
COMPARISONS = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
LOGIC = {ast.BitAnd: "&", ast.BitOr: "|"}  # of conditions
