// Scalar, branch-free functions that a plain loop turns into full-width SIMD, without -ffast-math or libm.
// Each bound is the largest error measured in ULP, for float and double, with FMA and without (x86-64-v2):
// over all 2^32 inputs for float, over 10^8 random ones for double.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#define FUSEDLOSS_INLINE inline __attribute__((always_inline))

namespace fusedloss::math {

namespace detail {

template <class T>
struct Format;

template <>
struct Format<float> {
    using Bits = std::uint32_t;
    static constexpr int fraction = 23;
    static constexpr Bits bias = 127;
    static constexpr float ln2_hi = 0x1.62e4p-1f;  // 16 bits, so that k * ln2_hi is exact
    static constexpr float ln2_lo = 0x1.7f7d1cp-20f;
    static constexpr float exp_min = -104.0f;  // exp rounds to 0 below, and overflows above exp_max
    static constexpr float exp_max = 89.0f;
    static constexpr int raise = 48;
};

template <>
struct Format<double> {
    using Bits = std::uint64_t;
    static constexpr int fraction = 52;
    static constexpr Bits bias = 1023;
    static constexpr double ln2_hi = 0x1.62e42fefap-1;  // 36 bits
    static constexpr double ln2_lo = 0x1.cf79abc9e3b3ap-40;
    static constexpr double exp_min = -746.0;
    static constexpr double exp_max = 710.0;
    static constexpr int raise = 128;
};

template <class T>
using Bits = typename Format<T>::Bits;

template <class T>
constexpr Bits<T> bits(T x) {
    return std::bit_cast<Bits<T>>(x);
}

template <class T>
constexpr T from_bits(Bits<T> b) {
    return std::bit_cast<T>(b);
}

template <class T>
constexpr T power_of_two(int k) {
    return from_bits<T>((Bits<T>(k) + Format<T>::bias) << Format<T>::fraction);
}

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

template <class T>
constexpr T nan = std::numeric_limits<T>::quiet_NaN();

// c0 + c1 x + c2 x^2 + ..., given xx = x^2: as many operations as Horner's rule in half the latency.
template <class T>
FUSEDLOSS_INLINE T polynomial(T, T, T c0) {
    return c0;
}

template <class T, class... Rest>
FUSEDLOSS_INLINE T polynomial(T x, T xx, T c0, T c1, Rest... rest) {
    const T pair = c0 + x * c1;
    if constexpr (sizeof...(rest) == 0) {
        return pair;
    } else {
        return pair + xx * polynomial(x, xx, rest...);
    }
}

// (e^r - 1 - r) / r^2 for |r| <= ln2 / 2: minimax, relative error of e^r 2^-28.2.
template <class T>
FUSEDLOSS_INLINE T exp_tail(T r, T rr) {
    return polynomial(r, rr, T(0x1.fffffcp-2f), T(0x1.555492p-3f), T(0x1.5558bp-5f), T(0x1.12398ep-7f),
                      T(0x1.6a4d6ap-10f));
}

// The same: 2^-57.3.
FUSEDLOSS_INLINE double exp_tail(double r, double rr) {
    return polynomial(r, rr, 0.5, 0x1.5555555555501p-3, 0x1.55555555531e8p-5, 0x1.111111112895cp-7,
                      0x1.6c16c17ccdd39p-10, 0x1.a01a011be5ea1p-13, 0x1.a019ab08fad05p-16,
                      0x1.71df559ec58c8p-19, 0x1.289fb198a0070p-22, 0x1.ad1fd5c941ab3p-26);
}

// exp(x + low), for |low| far below |x|.
template <class T>
FUSEDLOSS_INLINE T exp(T x, T low) {
    using F = Format<T>;
    constexpr T log2e = T(0x1.71547652b82fep0);
    constexpr T round = T(3) * power_of_two<T>(F::fraction - 1) + T(2 * F::bias);
    const T shifted = x * log2e + round;  // the sum has no room for a fraction: k lands in its low bits
    const T k = shifted - round;
    const T r_hi = x - k * F::ln2_hi;
    const T r_lo = k * F::ln2_lo - low;
    const T r = r_hi - r_lo;
    const T rr = r * r;
    const T y = T(1) + (r_hi + (rr * exp_tail(r, rr) - r_lo));
    // 2^k as two factors: one alone reaches neither the subnormals nor the largest binade.
    const Bits<T> both = bits(shifted);
    const Bits<T> half = both >> 1;
    T out = y * from_bits<T>(half << F::fraction) * from_bits<T>((both - half) << F::fraction);
    // Chosen last: clamping x first would let the compiler duplicate all of the above per clamp.
    out = x < F::exp_min ? T(0) : out;
    return x > F::exp_max ? infinity<T> : out;
}

// 2^raise exp(x) for x <= 0, but 0 below `least`.
template <int raise, class T>
FUSEDLOSS_INLINE T exp_of_negative(T x, T least) {
    using F = Format<T>;
    constexpr T log2e = T(0x1.71547652b82fep0);
    constexpr T round = T(3) * power_of_two<T>(F::fraction - 1) + T(F::bias + raise);
    const T shifted = x * log2e + round;
    const T k = shifted - round;
    const T r = (x - k * F::ln2_hi) - k * F::ln2_lo;
    const T rr = r * r;
    const T y = T(1) + (r + rr * exp_tail(r, rr));
    const T out = y * from_bits<T>(bits(shifted) << F::fraction);
    return x < least ? T(0) : out;
}

// (log(1 + f) - f + f^2 / 2) / f^3 for -1/4 <= f <= 1/2: minimax, relative error of the log 2^-27.6.
FUSEDLOSS_INLINE float log_tail(float f) {
    const float ff = f * f;
    const float p = polynomial(f, ff, 0x1.5555a4p-2f, -0x1.000046p-2f, 0x1.99695ep-3f, -0x1.54ed84p-3f,
                               0x1.288482p-3f, -0x1.0da4f4p-3f, 0x1.ad0a74p-4f, -0x1.71e776p-5f);
    return ff * (f * p - 0.5f);
}

// 2 atanh(s) / s - 2 over z = s^2 <= 1/25: minimax, relative error of the log 2^-62.6.
FUSEDLOSS_INLINE double atanh_tail(double z) {
    return z * polynomial(z, z * z, 0x1.555555555554fp-1, 0x1.999999999c175p-2, 0x1.24924921e4c09p-2,
                          0x1.c71c748f36702p-3, 0x1.745c4b01cc296p-3, 0x1.3b35bb585b993p-3,
                          0x1.0dcbf8bb9c83dp-3, 0x1.1b7ecea83db74p-3);
}

// One division here costs less than the ten more terms that a polynomial in f would need.
FUSEDLOSS_INLINE double log_tail(double f) {
    const double s = f / (2.0 + f);
    const double half = 0.5 * f * f;
    return s * (half + atanh_tail(s * s)) - half;
}

// k ln2 + log(1 + f): the rounding of the leading sum is kept, or it would cost half an ULP.
template <class T>
FUSEDLOSS_INLINE T log_sum(T k, T f) {
    const T big = k * Format<T>::ln2_hi;
    const T sum = big + f;
    const T lost = (big - sum) + f;
    return sum + (log_tail(f) + (k * Format<T>::ln2_lo + lost));
}

// Added to the bits of x = 2^k m, 3/4 <= m < 3/2, it makes the exponent field hold k + bias.
template <class T>
constexpr Bits<T> centre = bits(T(1)) - bits(T(0.75));

// The exponent field as a number, less offset: integer conversions of 64 bits need AVX-512.
template <class T>
FUSEDLOSS_INLINE T exponent(Bits<T> b, T offset) {
    constexpr T one_unit = power_of_two<T>(Format<T>::fraction);
    return from_bits<T>((b >> Format<T>::fraction) | bits(one_unit)) - (one_unit + offset);
}

template <class T>
struct Split {
    T k, f;
};

// x = 2^k (1 + f) with f in [-1/4, 1/2), for any positive finite x.
template <class T>
FUSEDLOSS_INLINE Split<T> split(T x) {
    using F = Format<T>;
    constexpr int up = F::fraction + 1;
    const bool subnormal = x < std::numeric_limits<T>::min();
    const T normal = subnormal ? x * power_of_two<T>(up) : x;
    const Bits<T> b = bits(normal) + centre<T>;
    constexpr Bits<T> mask = (Bits<T>(1) << F::fraction) - 1;
    return {exponent<T>(b, subnormal ? T(F::bias + up) : T(F::bias)),
            from_bits<T>((b & mask) + bits(T(0.75))) - T(1)};
}

template <class T>
FUSEDLOSS_INLINE T log(T x) {
    const Split<T> s = split(x);
    T out = log_sum(s.k, s.f);
    out = x < infinity<T> ? out : x;
    return x > T(0) ? out : (x == T(0) ? -infinity<T> : nan<T>);
}

template <class T>
FUSEDLOSS_INLINE T log1p(T x) {
    using F = Format<T>;
    constexpr Bits<T> field = (2 * F::bias + 1) << F::fraction;
    constexpr Bits<T> sign = ~(~Bits<T>(0) >> 1);
    const Bits<T> b = bits(T(1) + x) + centre<T>;
    const Bits<T> e = b & field;
    // f = 2^-k x + (2^-k - 1), exact; as 2 * 2^-k, since 2^-k alone is subnormal for the largest x.
    const T scaled = from_bits<T>(bits(x) + bits(T(1)) - e);
    const T f = scaled + (T(0.5) * from_bits<T>(field - e) - T(1));
    T out = log_sum(exponent<T>(b, T(F::bias)), f);
    out = from_bits<T>(bits(out) | (bits(x) & sign));  // for -0
    out = x < infinity<T> ? out : x;
    return x > T(-1) ? out : (x == T(-1) ? -infinity<T> : nan<T>);
}

// log(1 + e) for 0 <= e <= 1.
template <class T>
FUSEDLOSS_INLINE T log1p_unit(T e) {
    const bool upper = e > T(0.5);
    const T f = upper ? T(0.5) * e - T(0.5) : e;
    const T hi = upper ? Format<T>::ln2_hi : T(0);
    const T lo = upper ? Format<T>::ln2_lo : T(0);
    return hi + (f + (log_tail(f) + lo));
}

// The leading 26 bits.
FUSEDLOSS_INLINE double upper_half(double x) { return from_bits<double>(bits(x) & ~Bits<double>(0) << 27); }

FUSEDLOSS_INLINE double pow(double x, double p) {
    using F = Format<double>;
    const Split<double> v = split(x);
    // s = f / (2 + f) = s_hi + s_lo: halves of 26 bits make every product exact, with FMA or without.
    const double d = 2.0 + v.f;
    const double d_hi = upper_half(d);
    const double d_lo = v.f - (d_hi - 2.0);
    const double inverse = 1.0 / d;
    const double s_hi = upper_half(v.f * inverse);
    const double s_lo = ((v.f - s_hi * d_hi) - s_hi * d_lo) * inverse;
    const double s = s_hi + s_lo;
    // log x = sum + low
    const double big = v.k * F::ln2_hi;
    const double sum = big + 2.0 * s_hi;
    const double lost = (big - sum) + 2.0 * s_hi;
    const double low = (s * atanh_tail(s * s) + (2.0 * s_lo + v.k * F::ln2_lo)) + lost;
    // p log x = y + y_low
    const double l = sum + low;
    const double l_hi = upper_half(l);
    const double l_lo = low - (l_hi - sum);
    const double p_hi = upper_half(p);
    const double p_lo = p - p_hi;
    const double y = p * l;
    const double y_low = ((p_hi * l_hi - y) + p_lo * l_hi) + p * l_lo;
    double out = exp(y, __builtin_fabs(y) < 1000.0 ? y_low : 0.0);
    out = x == 0.0 ? (p > 0.0 ? 0.0 : infinity<double>) : out;
    out = x == infinity<double> ? (p > 0.0 ? x : 0.0) : out;
    out = x >= 0.0 && p == p ? out : nan<double>;
    return p == 0.0 || x == 1.0 ? 1.0 : out;
}

}  // namespace detail

FUSEDLOSS_INLINE float abs(float x) { return __builtin_fabsf(x); }
FUSEDLOSS_INLINE double abs(double x) { return __builtin_fabs(x); }

FUSEDLOSS_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
FUSEDLOSS_INLINE double sqrt(double x) { return __builtin_sqrt(x); }

FUSEDLOSS_INLINE float where(bool c, float a, float b) { return c ? a : b; }
FUSEDLOSS_INLINE double where(bool c, double a, double b) { return c ? a : b; }

// NaN in either argument gives NaN; the test of a constant b folds away.
FUSEDLOSS_INLINE float maximum(float a, float b) { return b != b ? b : (a < b ? b : a); }
FUSEDLOSS_INLINE double maximum(double a, double b) { return b != b ? b : (a < b ? b : a); }
FUSEDLOSS_INLINE float minimum(float a, float b) { return b != b ? b : (a > b ? b : a); }
FUSEDLOSS_INLINE double minimum(double a, double b) { return b != b ? b : (a > b ? b : a); }

// k ln2 + r, polynomial of degree 6 and 11, gradual underflow: 0.91 and 0.91 ULP; never above 1 for x <= 0.
FUSEDLOSS_INLINE float exp(float x) { return detail::exp(x, 0.0f); }
FUSEDLOSS_INLINE double exp(double x) { return detail::exp(x, 0.0); }
// exp of x <= 0 with fewer operations, 0 where that is below the smallest normal: 1.03 and 1.03 ULP.
template <class T>
constexpr T least_normal_exp = (T(1) - T(detail::Format<T>::bias)) * T(0.69314718055994530942);
FUSEDLOSS_INLINE float exp_softmax(float x) { return detail::exp_of_negative<0>(x, least_normal_exp<float>); }
FUSEDLOSS_INLINE double exp_softmax(double x) {
    return detail::exp_of_negative<0>(x, least_normal_exp<double>);
}

// The same times `raised`, a power of two so large that no result is subnormal: exps wait like this for what
// they are multiplied by, and lose no digits where they are small, nor do many of them in their sum. 0 where
// this would be subnormal.
template <class T>
constexpr T raised = detail::power_of_two<T>(detail::Format<T>::raise);
template <class T>
constexpr T least_raised_exp =
    (T(1) - T(detail::Format<T>::bias) - T(detail::Format<T>::raise)) * T(0.69314718055994530942);
template <class T>
constexpr T lowered = detail::power_of_two<T>(-detail::Format<T>::raise);
template <class T>
FUSEDLOSS_INLINE T exp_raised(T x) {
    return detail::exp_of_negative<detail::Format<T>::raise>(x, least_raised_exp<T>);
}

// exp(x) - 1 for x <= 0, from e = exp(x): 1.6 and 1.6 ULP.
template <class T>
FUSEDLOSS_INLINE T expm1_of_negative(T x, T e) {
    const T xx = x * x;
    return x > T(-0.34) ? x + xx * detail::exp_tail(x, xx) : e - T(1);
}

// Exponent and mantissa in [3/4, 3/2), subnormals too: 0.97 and 0.98 ULP (0.92 and 0.89 with FMA).
FUSEDLOSS_INLINE float log(float x) { return detail::log(x); }
FUSEDLOSS_INLINE double log(double x) { return detail::log(x); }

// log x, but 0 at 0. Chosen last: GCC computes the logarithm of a chosen argument twice.
template <class T>
FUSEDLOSS_INLINE T log_or_zero(T x) {
    return where(x == T(0), T(0), log(x));
}

// As log, with the mantissa of 1 + x made from x itself, exactly: 0.98 and 0.98 ULP (0.93 and 0.90 with FMA).
FUSEDLOSS_INLINE float log1p(float x) { return detail::log1p(x); }
FUSEDLOSS_INLINE double log1p(double x) { return detail::log1p(x); }

// log x and log(1 - x) for 0 <= x <= 1.
template <class T>
struct Logs {
    T part, rest;
};
FUSEDLOSS_INLINE Logs<float> logs_of_parts(float x) { return {log(x), log1p(-x)}; }
FUSEDLOSS_INLINE Logs<double> logs_of_parts(double x) { return {log(x), log1p(-x)}; }

// exp(-|x|), from which sigmoid and log_sigmoid are made.
FUSEDLOSS_INLINE float exp_minus_abs(float x) { return exp(-abs(x)); }
FUSEDLOSS_INLINE double exp_minus_abs(double x) { return exp(-abs(x)); }

// log(1 + e) for 0 <= e <= 1.
FUSEDLOSS_INLINE float log1p_unit(float e) { return detail::log1p_unit(e); }
FUSEDLOSS_INLINE double log1p_unit(double e) { return detail::log1p_unit(e); }

// From e = exp(-|x|): 1.81 and 1.81 ULP in both tails (1.65 and 1.65 with FMA).
template <class T>
FUSEDLOSS_INLINE T sigmoid(T x, T e) {
    const T t = e / (T(1) + e);
    // e / (1 + e) = e - e t: the rounding of 1 + e then hardly counts. Two whole expressions to choose from,
    // not one of a chosen factor, so that loop body and remainder contract alike and give the same bits.
    return where(x < T(0), e - e * t, T(1) - t);
}
template <class T>
FUSEDLOSS_INLINE T sigmoid(T x) {
    return sigmoid(x, exp_minus_abs(x));
}

// min(x, 0) - l, l = log(1 + exp(-|x|)): 1.66 and 1.63 ULP in both tails.
template <class T>
FUSEDLOSS_INLINE T log_sigmoid(T x, T l) {
    return where(x > T(0), T(0), x) - l;
}
template <class T>
FUSEDLOSS_INLINE T log_sigmoid(T x) {
    return log_sigmoid(x, log1p_unit(exp_minus_abs(x)));
}

// In the formulas' derivatives it is more than a maximum.
template <class T>
FUSEDLOSS_INLINE T at_least(T x, T least) {
    return maximum(x, least);
}

// exp(p log x) for x >= 0 (NaN below), the logarithm in two parts: 0.95 ULP for |p| <= 16, 3 for |p| <= 100.
FUSEDLOSS_INLINE double pow(double x, double p) { return detail::pow(x, p); }
FUSEDLOSS_INLINE float pow(float x, double p) { return float(detail::pow(double(x), p)); }

}  // namespace fusedloss::math

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include "avx512.h"
#endif

namespace fusedloss::math {

// What the loops compute with: T, or as many of it as one register holds.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
template <class T>
using Lanes = std::conditional_t<std::is_same_v<T, float>, Floats, T>;
#else
template <class T>
using Lanes = T;
#endif

template <class T>
constexpr int lanes = sizeof(Lanes<T>) / sizeof(T);

template <class T>
FUSEDLOSS_INLINE Lanes<T> get(const T* p) {
    if constexpr (lanes<T> == 1)
        return *p;
    else
        return Lanes<T>::load(p);
}

template <class T>
FUSEDLOSS_INLINE void put(T* p, Lanes<T> v) {
    if constexpr (lanes<T> == 1)
        *p = v;
    else
        v.store(p);
}

// out[i] = f(in[i]...), whatever n is.
template <class T, class F, class... In>
FUSEDLOSS_INLINE void map(T* out, std::int64_t n, F f, const In*... in) {
    if constexpr (lanes<T> == 1) {
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) out[i] = f(in[i]...);
    } else {
        std::int64_t i = 0;
        for (; i + lanes<T> <= n; i += lanes<T>) put(out + i, f(get(in + i)...));
        if (i < n) f(Lanes<T>::load(in + i, n - i)...).store(out + i, n - i);
    }
}

}  // namespace fusedloss::math

#undef FUSEDLOSS_INLINE
