"""csrc/math.h: the error bounds that its comments state, and every special value."""

from ctypes import c_double, c_int64, c_void_p

import mpmath
import numpy as np
import pytest

from fusedloss.engines.cpu import library
from fusedloss.engines.cpu.load import MANY
from fusedloss.kinds.names import FUNCTIONS

# The largest error in ULP: (float32, float64).
BOUNDS = {name: known.bounds for name, known in FUNCTIONS.items() if known.bounds}
POW_BOUNDS = {16: 0.95, 100: 3.0}  # by the largest |p|

CASES = [(name, dtype) for name in BOUNDS for dtype in (np.float32, np.float64)]
INF, NAN = np.inf, np.nan


def bound(name: str, dtype: type) -> float:
    return BOUNDS[name][dtype is np.float64]


def call(name: str, x: np.ndarray, elements: int = MANY) -> np.ndarray:
    """By the kernels for inputs of so many elements."""
    x = np.ascontiguousarray(x)
    out = np.empty_like(x)
    function = library(elements)[f"fusedloss_math_{name}_f{8 * x.itemsize}"]
    function(c_void_p(x.ctypes.data), c_void_p(out.ctypes.data), c_int64(x.size))
    return out


def call_pow(x: np.ndarray, p: float) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float64)
    out = np.empty_like(x)
    function = library()["fusedloss_math_pow_f64"]
    function(c_void_p(x.ctypes.data), c_double(p), c_void_p(out.ctypes.data), c_int64(x.size))
    return out


def reference(name: str, x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    if name == "sigmoid":
        return np.where(x >= 0, 1, e) / (1 + e)
    if name == "log_sigmoid":
        return np.minimum(x, 0) - np.log1p(e)
    return getattr(np, name)(x)


def exact(name: str, x: float) -> mpmath.mpf:
    x = mpmath.mpf(x)
    if name == "sigmoid":
        return 1 / (1 + mpmath.exp(-x))
    if name == "log_sigmoid":
        return -mpmath.log1p(mpmath.exp(-x))
    return getattr(mpmath, name)(x)


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """The error in units of the last place of ``want``, which is of a wider type than ``got``."""
    info = np.finfo(got.dtype)
    exponent = np.maximum(np.frexp(want)[1] - 1, info.minexp)
    error = np.abs(got.astype(want.dtype) - want)
    error = np.ldexp(error, info.nmant - exponent)
    rounded = want.astype(got.dtype)
    same = (got == rounded) | (np.isnan(got) & np.isnan(want))
    return np.where(np.isfinite(got) & np.isfinite(want), error, np.where(same, 0, INF))


def samples(name: str, dtype: type, n: int = 200_000) -> np.ndarray:
    """Every binade of the domain, and densely where the function is not trivial."""
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 2 ** (8 * dtype().itemsize), n, np.uint64)
    every = bits.astype(f"u{dtype().itemsize}").view(dtype)
    narrow, wide = (104, 89) if dtype is np.float32 else (746, 710)
    if name == "log":
        parts = [np.abs(every), rng.uniform(0, 3, n), 1 + rng.normal(0, 1e-3, n)]
    elif name == "log1p":
        parts = [np.abs(every), rng.uniform(-1, 3, n), rng.normal(0, 1e-3, n)]
    else:
        parts = [rng.uniform(-narrow, wide, n), rng.uniform(-8, 8, n), rng.uniform(-1, 1, n), every]
    return np.concatenate([part.astype(dtype) for part in parts])


@np.errstate(all="ignore")
def edges(name: str, dtype: type) -> np.ndarray:
    """The four nearest numbers on both sides of every point where something changes."""
    info = np.finfo(dtype)
    ln2 = np.log(2)
    points = [0, info.smallest_subnormal, info.tiny, info.eps, 1e-3]
    points += [0.25, 1 / 3, 0.5, 0.75, 1, 1.5, 2, 3]
    points += [ln2 * k / 2 for k in (1, 2, 3, 5, 7)]
    if name in ("log", "log1p"):
        points += [info.max, info.max / 2, info.max * 0.75, 1 / info.eps, 3 / info.eps, 1e30, 1e-30]
    else:
        points += [-np.log(float(info.eps)), -np.log(float(info.tiny))]
        points += [88.72, 103.2, 103.97, 709.78, 745.13]
    x = np.array(points, dtype)
    x = np.concatenate([x, -x])
    down = up = x
    for _ in range(4):
        down, up = np.nextafter(down, dtype(-INF)), np.nextafter(up, dtype(INF))
        x = np.concatenate([x, down, up])
    return np.unique(x)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@np.errstate(all="ignore")
def test_bulk(name: str, dtype: type) -> None:
    wide = np.float64 if dtype is np.float32 else np.longdouble
    if np.finfo(wide).nmant < np.finfo(dtype).nmant + 8:
        pytest.skip("long double is no wider than double here; test_edges covers float64")
    x = samples(name, dtype)
    got = call(name, x)
    error = ulps(got, reference(name, x.astype(wide)))
    worst = int(np.argmax(error))
    assert error[worst] <= bound(name, dtype), f"{name}({x[worst]!r}) gave {got[worst]!r}"


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_edges(name: str, dtype: type) -> None:
    info = np.finfo(dtype)
    x = np.concatenate([edges(name, dtype), samples(name, dtype, 100)])
    x = x[np.isfinite(x) & (x > {"log": 0, "log1p": -1}.get(name, -INF))]
    if name not in ("log", "log1p"):
        x = x[np.abs(x) < 800]  # beyond, mpmath takes for ever
    with mpmath.workprec(300):
        for point, got in zip(x.tolist(), call(name, x).tolist(), strict=True):
            want = exact(name, point)
            if want > info.max:
                ok = got == INF or got == info.max
            else:
                exponent = max(mpmath.frexp(want)[1] - 1, info.minexp)
                error = abs(mpmath.mpf(got) - want) * mpmath.mpf(2) ** (info.nmant - exponent)
                ok = error <= bound(name, dtype)
            assert ok, f"{name}({point.hex()}) gave {got.hex()}, not {mpmath.nstr(want, 20)}"


SPECIAL = {
    "exp": [(0.0, 1), (-0.0, 1), (INF, INF), (-INF, 0), (1e30, INF), (-1e30, 0)],
    "log": [(1, 0), (0.0, -INF), (-0.0, -INF), (INF, INF), (-1, NAN), (-1e-40, NAN), (-INF, NAN)],
    "log1p": [(0.0, 0.0), (-0.0, -0.0), (-1, -INF), (INF, INF), (-1.5, NAN), (-INF, NAN)],
    "sigmoid": [(0.0, 0.5), (-0.0, 0.5), (INF, 1), (-INF, 0), (1e30, 1), (-1e30, 0)],
    "log_sigmoid": [(INF, 0), (-INF, -INF), (1e30, 0), (-1e30, -1e30)],
}


@pytest.mark.parametrize(("name", "dtype"), CASES)
@np.errstate(all="ignore")
def test_special(name: str, dtype: type) -> None:
    x, want = np.array(SPECIAL[name] + [(NAN, NAN), (-NAN, NAN)], dtype).T
    payload = np.array([0x7FC00001, 0xFF800001], np.uint32).view(np.float32).astype(dtype)
    got = call(name, np.concatenate([x, payload]))
    want = np.concatenate([want, payload])
    np.testing.assert_array_equal(got, want)
    signed = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[signed]), np.signbit(want[signed]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_of_nothing_positive_is_at_most_one(dtype: type) -> None:
    x = -np.abs(samples("exp", dtype))
    tiny = -np.geomspace(np.finfo(dtype).smallest_subnormal, 1e-3, 10_000, dtype=dtype)
    assert np.nanmax(call("exp", np.concatenate([x, tiny]))) <= 1


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_same_bits_at_every_position(name: str, dtype: type) -> None:
    x = samples(name, dtype, 300)[:1003]
    whole = call(name, x)
    for start in range(17):
        np.testing.assert_array_equal(call(name, x[start:]), whole[start:])
    np.testing.assert_array_equal([call(name, x[i : i + 1])[0] for i in range(x.size)], whole)


@pytest.mark.parametrize(
    ("name", "dtype"), CASES + [("log_part", np.float32), ("log_rest", np.float32)]
)
@np.errstate(all="ignore")
def test_same_bits_for_small_inputs(name: str, dtype: type) -> None:
    if name in ("log_part", "log_rest"):
        x = np.random.default_rng(9).uniform(0, 1, 200_000).astype(dtype)
        x = np.concatenate([x, [0, 1, 0.5, 1e-40, np.nextafter(dtype(1), dtype(0))]]).astype(dtype)
    else:
        x = np.concatenate([samples(name, dtype), edges(name, dtype), [INF, -INF, NAN]]).astype(
            dtype
        )
    kind = f"u{x.itemsize}"
    np.testing.assert_array_equal(call(name, x, 1).view(kind), call(name, x).view(kind))


@pytest.mark.parametrize("largest", POW_BOUNDS)
@np.errstate(all="ignore")
def test_pow(largest: int) -> None:
    if np.finfo(np.longdouble).nmant < 60:
        pytest.skip("long double is no wider than double here")
    rng = np.random.default_rng(largest)
    any_bits = rng.integers(0, 0x7FF0 << 48, 4000, np.uint64).view(np.float64)
    x = np.concatenate([any_bits, rng.uniform(0, 30, 4000), rng.uniform(0.5, 2, 4000)])
    for p in [*rng.uniform(-largest, largest, 20), *rng.integers(-largest, largest + 1, 5), 0.5, 2]:
        got = call_pow(x, float(p))
        error = ulps(got, np.power(x.astype(np.longdouble), np.longdouble(p)))
        worst = int(np.argmax(error))
        assert error[worst] <= POW_BOUNDS[largest], f"pow({x[worst]!r}, {p!r}) gave {got[worst]!r}"


@np.errstate(all="ignore")
def test_pow_special() -> None:
    x = np.array([0.0, -0.0, 5e-324, 0.25, 1.0, 4.0, 1e308, INF, NAN])
    for p in [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, -2.0, 1e308, -1e308, INF, -INF, NAN]:
        np.testing.assert_array_equal(call_pow(x, p), np.power(np.abs(x), p), err_msg=f"p = {p}")
    assert np.isnan(call_pow(np.array([-1.0, -INF]), 2.0)).all()
    whole = np.arange(1.0, 100)
    np.testing.assert_array_equal(call_pow(whole, 3.0), whole**3)
    np.testing.assert_array_equal(call_pow(whole**2, 0.5), whole)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_softmax(dtype: type) -> None:
    """exp of what is not positive: within its bound where normal, and 0 below."""
    wide = np.float64 if dtype is np.float32 else np.longdouble
    info = np.finfo(dtype)
    least = np.log(wide(info.tiny))
    rng = np.random.default_rng(8)
    x = np.concatenate([-rng.exponential(s, 200_000) for s in (0.01, 1, 20)]).astype(dtype)
    x = x[x > least * wide(0.999)]
    assert ulps(call("exp_softmax", x), np.exp(x.astype(wide))).max() <= 1.03
    below = np.array([least * 1.001, -1e30, -INF], dtype)
    assert call("exp_softmax", below).tolist() == [0, 0, 0]
    assert call("exp_softmax", np.array([0, -0.0], dtype)).tolist() == [1, 1]
    assert np.isnan(call("exp_softmax", np.array([NAN], dtype))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@np.errstate(all="ignore")
def test_logs_of_parts(dtype: type) -> None:
    """log x and log(1 - x) of 0 <= x <= 1, each within the bound of its own function."""
    wide = np.float64 if dtype is np.float32 else np.longdouble
    rng = np.random.default_rng(9)
    places = np.concatenate([np.arange(63) / 62, np.arange(125) / 124])  # where tables change
    parts = [rng.uniform(0, 1, 400_000), 2.0 ** rng.uniform(-150, 0, 100_000), places]
    x = np.concatenate(parts).astype(dtype)
    x = np.concatenate([x, np.nextafter(x, dtype(0)), 1 - x])
    y = x.astype(wide)
    if np.finfo(wide).nmant >= np.finfo(dtype).nmant + 8:
        assert ulps(call("log_part", x), np.log(y)).max() <= bound("log", dtype)
        assert ulps(call("log_rest", x), np.log1p(-y)).max() <= bound("log1p", dtype)
    ends = np.array([0, 1], dtype)
    part, rest = call("log_part", ends), call("log_rest", ends)
    np.testing.assert_array_equal([part, rest], [[-INF, 0], [-0.0, -INF]])
    np.testing.assert_array_equal(np.signbit([part[1], rest[0]]), [False, True])
    for start in range(17):
        np.testing.assert_array_equal(call("log_part", x[start:99]), call("log_part", x)[start:99])
