"""The namespace `m` of the formulas (`kinds/names.py`), here for Triton, and what other kernels compute with.

float32 takes the polynomials of that file, with its bounds: Triton's own `tl.log` flushes subnormal
arguments, and its `tl.exp` loses digits of large ones. float64 takes the functions of the device's
library. Tensors stand left of constants, as the interpreter wants.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

inf = tl.constexpr(float("inf"))

_LOG2E = tl.constexpr(float.fromhex("0x1.715476p0"))
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_LN2_HI = tl.constexpr(float.fromhex("0x1.62e4p-1"))  # 16 bits, so that k * _LN2_HI is exact
_LN2_LO = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
_LEAST_NORMAL = tl.constexpr(float.fromhex("0x1p-126"))
_LEAST_NORMAL_DOUBLE = tl.constexpr(float.fromhex("0x1p-1022"))
_ONE = tl.constexpr(0x3F800000)  # the bits of 1, of 3/4, and of infinity
_THREE_QUARTERS = tl.constexpr(0x3F400000)
_INFINITE = tl.constexpr(0x7F800000)
_FRACTION = tl.constexpr(0x007FFFFF)
_ROUND = tl.constexpr(3.0 * 2**22 + 127)  # the sum's low bits are those of the exponent of 2^k
_ROUND_RAISED = tl.constexpr(3.0 * 2**22 + 127 + 48)
_LEAST_EXPONENT = tl.constexpr(-126 * 0.69314718055994530942)

_E2 = tl.constexpr(float.fromhex("0x1.fffffcp-2"))
_E3 = tl.constexpr(float.fromhex("0x1.555492p-3"))
_E4 = tl.constexpr(float.fromhex("0x1.5558bp-5"))
_E5 = tl.constexpr(float.fromhex("0x1.12398ep-7"))
_E6 = tl.constexpr(float.fromhex("0x1.6a4d6ap-10"))

_T0 = tl.constexpr(-1.61468768441708447952e3)
_T1 = tl.constexpr(-9.92877231001918586564e1)
_T2 = tl.constexpr(-9.64399179425052238628e-1)
_U0 = tl.constexpr(4.84406305325125486048e3)
_U1 = tl.constexpr(2.23548839060100448583e3)
_U2 = tl.constexpr(1.12811678491632931402e2)

_L3 = tl.constexpr(float.fromhex("0x1.5555a4p-2"))
_L4 = tl.constexpr(float.fromhex("-0x1.000046p-2"))
_L5 = tl.constexpr(float.fromhex("0x1.99695ep-3"))
_L6 = tl.constexpr(float.fromhex("-0x1.54ed84p-3"))
_L7 = tl.constexpr(float.fromhex("0x1.288482p-3"))
_L8 = tl.constexpr(float.fromhex("-0x1.0da4f4p-3"))
_L9 = tl.constexpr(float.fromhex("0x1.ad0a74p-4"))
_L10 = tl.constexpr(float.fromhex("-0x1.71e776p-5"))


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def number(value: tl.constexpr, like):
    return tl.full((), value, like.dtype)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least(a, b):
    return maximum(a, b)


@triton.jit
def pow(a, b):
    b = tl.zeros_like(a) + b
    return _pow(a, b) if a.dtype == tl.float64 else _pow_of_float(a, b)


@triton.jit
def _pow_of_float(a, b):
    positive = tl.where(a > 0.0, a, 1.0).to(tl.float64)
    out = tl.exp(b.to(tl.float64) * tl.log(positive)).to(tl.float32)
    return _at_ends(a, b, out)


@triton.jit
def _pow(a, b):
    """a = 2^k f, so that of b log a only b log f, which is small, and the fraction of b k are rounded."""
    subnormal = a < _LEAST_NORMAL_DOUBLE
    usable = (a > 0.0) & (a < inf)
    scaled = tl.where(usable, tl.where(subnormal, a * 18014398509481984.0, a), 1.0)
    bits = scaled.to(tl.int64, bitcast=True)
    shift = (bits >> 52) - tl.where(subnormal & usable, 1023 + 54, 1023)
    f = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    upper = f > 1.4142135623730951
    f = tl.where(upper, 0.5 * f, f)
    k = (shift + upper.to(tl.int64)).to(tl.float64)
    high = b.to(tl.float32).to(tl.float64)  # times k exact
    whole = tl.floor(k * high + 0.5)
    rest = ((k * high - whole) + k * (b - high)) * 0.6931471805599453 + b * tl.log(f)
    both = tl.minimum(tl.maximum(whole, -2044.0), 2046.0).to(tl.int64)
    half = both >> 1
    out = tl.exp(rest) * ((half + 1023) << 52).to(tl.float64, bitcast=True)
    out = out * ((both - half + 1023) << 52).to(tl.float64, bitcast=True)
    return _at_ends(a, b, out)


@triton.jit
def _at_ends(a, b, out):
    out = tl.where(a == 0.0, tl.where(b > 0.0, 0.0, inf), out)
    out = tl.where(a == inf, tl.where(b > 0.0, inf, 0.0), out)
    out = tl.where((a >= 0.0) & (b == b), out, float("nan"))
    return tl.where((b == 0.0) | (a == 1.0), 1.0, out)


@triton.jit
def exp(x):
    return tl.exp(x) if x.dtype == tl.float64 else _exp(x)


@triton.jit
def _exp(x):
    k = tl.floor(x * _LOG2E + 0.5)
    high = x - k * _LN2_HI
    low = k * _LN2_LO
    r = high - low
    rr = r * r
    tail = (r * _E3 + _E2) + rr * ((r * _E5 + _E4) + rr * _E6)
    y = 1.0 + (high + (rr * tail - low))
    # 2^k as two factors: one alone reaches neither the subnormals nor the largest binade.
    both = k.to(tl.int32)
    half = both >> 1
    out = y * _float((half + 127) << 23) * _float((both - half + 127) << 23)
    out = tl.where(x < -104.0, 0.0, out)
    return tl.where(x > 89.0, inf, out)


@triton.jit
def _exp2(x):
    """The device's own, for float32. Subnormal results are 0, which cost `tl.exp2` three instructions."""
    if _INTERPRETED:
        y = tl.exp2(x)
    else:
        y = libdevice.exp2(x)
    return y


@triton.jit
def raised(x):
    """The power of two that exps wait with for what they are multiplied by: none is subnormal then."""
    return 18446744073709551616.0 if x.dtype == tl.float64 else 281474976710656.0


@triton.jit
def lowered(x):
    return 5.421010862427522e-20 if x.dtype == tl.float64 else 3.552713678800501e-15


@triton.jit
def exp_fast(x):
    """exp(x), raised, to 2**-22 (1 + |x|), in float32."""
    return _exp2(x * _LOG2E + 48.0)


@triton.jit
def exp_difference(x, y):
    """exp(x - y), raised, to 2**-22 (1 + |x| + |y|), in two instructions."""
    return _exp2(x * _LOG2E - (y * _LOG2E - 48.0))


@triton.jit
def exp_raised(x):
    """exp(x) for x <= 0, raised."""
    return _exp_raised_double(x) if x.dtype == tl.float64 else _exp_raised(x)


@triton.jit
def _exp_raised(x):
    shifted = x * _LOG2E + _ROUND_RAISED
    k = shifted - _ROUND_RAISED
    r = (x - k * _LN2_HI) - k * _LN2_LO
    out = _exp2(r * _LOG2E) * _float(_bits(shifted) << 23)
    return tl.where(x < -120.0, 0.0, out)


@triton.jit
def _exp_raised_double(x):
    low = x < -600.0
    out = tl.exp(tl.where(low, x + 128.0, x)) * 18446744073709551616.0
    return tl.where(low, out * 2.572209372642415e-56, out)


@triton.jit
def exp_softmax(x):
    return tl.exp(x) if x.dtype == tl.float64 else _exp_softmax(x)


@triton.jit
def _exp_softmax(x):
    """The device's own exp2 of the remainder alone, where it is good to 2 ULP."""
    shifted = x * _LOG2E + _ROUND
    k = shifted - _ROUND
    r = (x - k * _LN2_HI) - k * _LN2_LO
    out = _exp2(r * _LOG2E) * _float(_bits(shifted) << 23)
    return tl.where(x < _LEAST_EXPONENT, 0.0, out)


@triton.jit
def tanh(x):
    """A rational approximation near 0 (Cephes), else from exp(-2 |x|)."""
    z = x * x
    size = tl.abs(x)
    p = (z * _T2 + _T1) * z + _T0
    q = ((z + _U2) * z + _U1) * z + _U0
    e = exp_softmax(size * -2.0)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.625, x + x * z * (p / q), tl.where(x < 0.0, -far, far))


@triton.jit
def _log_tail(f):
    """log(1 + f) - f for -1/4 <= f <= 1/2."""
    ff = f * f
    p = (f * _L4 + _L3) + ff * ((f * _L6 + _L5) + ff * ((f * _L8 + _L7) + ff * (f * _L10 + _L9)))
    return ff * (f * p - 0.5)


@triton.jit
def _log_sum(k, f):
    """k ln2 + log(1 + f): the rounding of the leading sum is kept, or it would cost half an ULP."""
    big = k * _LN2_HI
    total = big + f
    lost = (big - total) + f
    return total + (_log_tail(f) + (k * _LN2_LO + lost))


@triton.jit
def log(x):
    return tl.log(x) if x.dtype == tl.float64 else _log(x)


@triton.jit
def _log(x):
    subnormal = x < _LEAST_NORMAL
    b = _bits(tl.where(subnormal, x * 16777216.0, x)) + (_ONE - _THREE_QUARTERS)
    k = (b >> 23) - tl.where(subnormal, 127 + 24, 127)
    out = _log_sum(k.to(tl.float32), _float((b & _FRACTION) + _THREE_QUARTERS) - 1.0)
    out = tl.where(x < inf, out, x)
    return tl.where(x > 0.0, out, tl.where(x == 0.0, -inf, float("nan")))


@triton.jit
def log_or_zero(x):
    return tl.where(x == 0.0, 0.0, log(x))


@triton.jit
def log1p(x):
    return _log1p_double(x) if x.dtype == tl.float64 else _log1p(x)


@triton.jit
def _log1p_double(x):
    """What 1 + x rounds away, made good: 2 ULP."""
    u = 1.0 + x
    out = tl.where(u == 1.0, x, tl.log(u) + (x - (u - 1.0)) / u)
    return tl.where((x < inf) & (u > 0.0), out, tl.log(u))


@triton.jit
def _log1p(x):
    b = _bits(1.0 + x) + (_ONE - _THREE_QUARTERS)
    e = b & _INFINITE
    # f = 2^-k x + (2^-k - 1), exact; as 2 * 2^-k, since 2^-k alone is subnormal for the largest x.
    f = _float(_bits(x) - e + _ONE) + (0.5 * _float(-(e - _INFINITE)) - 1.0)
    out = _log_sum(((b >> 23) - 127).to(tl.float32), f)
    out = tl.where((x < inf) & (x != 0.0), out, x)
    return tl.where(x > -1.0, out, tl.where(x == -1.0, -inf, float("nan")))


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1."""
    return _log1p_double(e) if e.dtype == tl.float64 else _log1p_half(e)


@triton.jit
def _log1p_half(e):
    upper = e > 0.5
    f = tl.where(upper, 0.5 * e - 0.5, e)
    return tl.where(upper, _LN2_HI, 0.0) + (f + (_log_tail(f) + tl.where(upper, _LN2_LO, 0.0)))


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    t = e / (1.0 + e)
    return tl.where(x >= 0.0, 1.0 - t, e - e * t)


@triton.jit
def log_sigmoid(x):
    return tl.where(x > 0.0, 0.0, x) - _log1p_unit(exp(-tl.abs(x)))
