"""p-norms of differences of rows, and their derivatives, for Triton.

They are summed in float64, where squares of float32 neither overflow nor underflow; those of float64, and
powers other than 1 and 2, are taken of ratios to the largest coordinate.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def difference(a, b, eps, known):
    return tl.where(known, a - b + eps, 0.0)


@triton.jit
def largest(v):
    """The largest magnitude of each row, or NaN."""
    size = tl.abs(v)
    nan = tl.max((v != v).to(tl.int32), 1) > 0
    return tl.where(nan, float("nan"), tl.max(size, 1)).to(tl.float64)


@triton.jit
def _ratio(v, largest):
    """|v| / largest, where that is a number between 0 and 1."""
    usable = (largest > 0.0) & (largest < float("inf"))
    return tl.abs(v).to(tl.float64) / tl.where(usable, largest, 1.0)[:, None]


@triton.jit
def _power(ratio, degree):
    """ratio^degree, 0 at 0, for ratios up to 1."""
    positive = tl.where(ratio > 0.0, ratio, 1.0)
    return tl.where(ratio > 0.0, tl.exp(degree * tl.log(positive)), ratio)


@triton.jit
def term(v, largest, degree, P: tl.constexpr, COMPUTE: tl.constexpr):
    """What is summed over a row: the power of the ratio, or of the coordinate where that is safe."""
    if P == 1:
        return tl.abs(v).to(tl.float64)
    elif P == 2 and tl.float32 == COMPUTE:
        return v.to(tl.float64) * v.to(tl.float64)
    elif P == 2:
        return _ratio(v, largest) * _ratio(v, largest)
    elif P == 0:
        return _power(_ratio(v, largest), degree)
    else:
        return (tl.abs(v).to(tl.float64) == largest[:, None]).to(tl.float64)


@triton.jit
def norm(total, largest, degree, P: tl.constexpr, COMPUTE: tl.constexpr):
    usable = (largest > 0.0) & (largest < float("inf"))
    if P == 1:
        return total
    elif P == 2 and tl.float32 == COMPUTE:
        return tl.sqrt(total)
    elif P == 2:
        return tl.where(usable, largest * tl.sqrt(tl.where(usable, total, 1.0)), largest)
    elif P == 0:
        power = tl.exp(tl.log(tl.where(usable, total, 1.0)) / degree)
        return tl.where(usable, largest * power, largest)
    else:
        return largest


@triton.jit
def slope(v, scale, norm, ties, degree, P: tl.constexpr):
    """The derivative of the norm by v, times scale; 0 at distance 0 and where scale is 0."""
    sign = tl.where(v > 0.0, 1.0, tl.where(v < 0.0, -1.0, v)).to(v.dtype)
    off = (scale == 0.0) | (norm == 0.0)
    safe = tl.where(off, 1.0, norm)
    if P == 2:
        slope = (scale / safe).to(v.dtype)[:, None] * v
    elif P == 1:
        slope = scale.to(v.dtype)[:, None] * sign
    elif P == 0:
        # Of the ratio to the distance, so that no power leaves the range; 0 where a coordinate is.
        ratio = tl.abs(v).to(tl.float64) / safe[:, None]
        steep = _power(ratio, degree - 1.0)
        slope = tl.where(ratio == 0.0, 0.0, scale[:, None] * steep).to(v.dtype) * sign
    else:
        # The largest coordinates share the derivative evenly.
        share = (scale / tl.where(ties > 0.0, ties, 1.0)).to(v.dtype)
        is_largest = tl.abs(v).to(tl.float64) == norm[:, None]
        slope = tl.where(is_largest, share[:, None] * sign, tl.where(v != v, v, 0.0))
    return tl.where(off[:, None], 0.0, slope)
