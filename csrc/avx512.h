// Sixteen floats as one value, or eight where FUSEDLOSS_NARROW is defined, and math.h for them with what only
// AVX-512 has: exponents and mantissas of subnormals too, tables in registers, a scaling that under- and
// overflows as it must. Bounds as in math.h; the same bits for both widths.
#pragma once
#include <cstdint>
#include <limits>

#include "intrinsics.h"

namespace fusedloss::math {

#if defined(FUSEDLOSS_NARROW)
#define MM(name) _mm256_##name
using Register = __m256;
using Words = __m256i;
using MaskBits = __mmask8;
#else
#define MM(name) _mm512_##name
using Register = __m512;
using Words = __m512i;
using MaskBits = __mmask16;
#endif

struct Mask {
    MaskBits m;
};

FUSEDLOSS_INLINE bool all(Mask a) { return a.m == MaskBits(-1); }
FUSEDLOSS_INLINE Mask operator&(Mask a, Mask b) { return {MaskBits(a.m & b.m)}; }
FUSEDLOSS_INLINE Mask operator|(Mask a, Mask b) { return {MaskBits(a.m | b.m)}; }

struct Floats {
    Register v;

    Floats() = default;
    FUSEDLOSS_INLINE Floats(Register v) : v(v) {}
    explicit FUSEDLOSS_INLINE Floats(double x) : v(MM(set1_ps)(float(x))) {}

    // All, or the first n; the others are 0.
    static FUSEDLOSS_INLINE Floats load(const float* p) { return MM(loadu_ps)(p); }
    static FUSEDLOSS_INLINE Floats load(const float* p, std::int64_t n) {
        return MM(maskz_loadu_ps)(first(n), p);
    }
    FUSEDLOSS_INLINE void store(float* p) const { MM(storeu_ps)(p, v); }
    FUSEDLOSS_INLINE void store(float* p, std::int64_t n) const { MM(mask_storeu_ps)(p, first(n), v); }

private:
    static FUSEDLOSS_INLINE MaskBits first(std::int64_t n) { return MaskBits((1u << n) - 1); }
};

// The compiler contracts these as it does those of scalars.
FUSEDLOSS_INLINE Floats operator+(Floats a, Floats b) { return a.v + b.v; }
FUSEDLOSS_INLINE Floats operator-(Floats a, Floats b) { return a.v - b.v; }
FUSEDLOSS_INLINE Floats operator*(Floats a, Floats b) { return a.v * b.v; }
FUSEDLOSS_INLINE Floats operator/(Floats a, Floats b) { return a.v / b.v; }
FUSEDLOSS_INLINE Floats operator-(Floats a) { return -a.v; }
FUSEDLOSS_INLINE Mask operator<(Floats a, Floats b) { return {MM(cmp_ps_mask)(a.v, b.v, _CMP_LT_OQ)}; }
FUSEDLOSS_INLINE Mask operator>(Floats a, Floats b) { return {MM(cmp_ps_mask)(a.v, b.v, _CMP_GT_OQ)}; }
FUSEDLOSS_INLINE Mask operator<=(Floats a, Floats b) { return {MM(cmp_ps_mask)(a.v, b.v, _CMP_LE_OQ)}; }
FUSEDLOSS_INLINE Mask operator>=(Floats a, Floats b) { return {MM(cmp_ps_mask)(a.v, b.v, _CMP_GE_OQ)}; }
FUSEDLOSS_INLINE Mask operator==(Floats a, Floats b) { return {MM(cmp_ps_mask)(a.v, b.v, _CMP_EQ_OQ)}; }
FUSEDLOSS_INLINE Mask operator!=(Floats a, Floats b) { return {MM(cmp_ps_mask)(a.v, b.v, _CMP_NEQ_UQ)}; }

FUSEDLOSS_INLINE Words words(Floats x) { return Words(x.v); }
FUSEDLOSS_INLINE Floats where(Mask c, Floats a, Floats b) { return MM(mask_mov_ps)(b.v, c.m, a.v); }
FUSEDLOSS_INLINE Floats abs(Floats x) { return MM(andnot_ps)(Floats(-0.0).v, x.v); }
FUSEDLOSS_INLINE Floats sqrt(Floats x) { return MM(sqrt_ps)(x.v); }

// The instruction gives its second operand where one is NaN. The test of a constant b folds away.
FUSEDLOSS_INLINE Floats maximum(Floats a, Floats b) {
    const Register greater = MM(max_ps)(b.v, a.v);
    return b.v == b.v ? greater : b.v;
}

namespace detail {

// Of 32 floats the one that the low five bits of `place` number, for each of them.
FUSEDLOSS_INLINE Floats look_up(const float (&table)[32], Floats place) {
    const __m512 low = _mm512_load_ps(table), high = _mm512_load_ps(table + 16);
#if defined(FUSEDLOSS_NARROW)
    const __m512i places = _mm512_castsi256_si512(words(place));
    return _mm512_castps512_ps256(_mm512_permutex2var_ps(low, places, high));
#else
    return _mm512_permutex2var_ps(low, words(place), high);
#endif
}

constexpr float whole = 0x1.8p23f;  // a float that is added to this has no room for a fraction

// log(1 + r) for -1/26 <= r <= 1/20: minimax, relative error 2^-29.0.
FUSEDLOSS_INLINE Floats short_log1p(Floats r) {
    const Floats rr = r * r;
    return r + rr * polynomial(r, rr, Floats(-0x1.fffff8p-2f), Floats(0x1.55568cp-2f),
                               Floats(-0x1.005528p-2f), Floats(0x1.91946ep-3f));
}

// For the m of [3/4, 3/2) nearest to n / 41, at place n mod 32: c near 41 / n, but 1 around 1, where -log c
// is within 2^-31 of a multiple of 2^-17, so that k ln2_hi is added to it exactly.
alignas(64) constexpr float inverse[32] = {
    0x1.47d6c4p0f,  0x1.3e23f8p0f,  0x1.34fcfap0f,  0x1.2bdf62p0f,  0x1.23381ap0f,  0x1.1b8d5ap0f,
    0x1.13ad34p0f,  0x1.0dc832p0f,  0x1p0f,         0x1p0f,         0x1p0f,         0x1.e83da6p-1f,
    0x1.dc87d8p-1f, 0x1.d22e6ap-1f, 0x1.c8d554p-1f, 0x1.bf4978p-1f, 0x1.b5254ap-1f, 0x1.acc68ap-1f,
    0x1.a49908p-1f, 0x1.9c190ap-1f, 0x1.937edcp-1f, 0x1.8cabaap-1f, 0x1.84ac04p-1f, 0x1.7deacp-1f,
    0x1.760f12p-1f, 0x1.6fe0b2p-1f, 0x1.69dc04p-1f, 0x1.63439ap-1f, 0x1.5e3ebp-1f,  0x1.57792p-1f,
    0x1p0f,         0x1.513c4ep0f};
alignas(64) constexpr float minus_log_inverse[32] = {
    -0x1.fa9p-3f, -0x1.bd1p-3f, -0x1.8148p-3f, -0x1.43f4p-3f, -0x1.07fcp-3f, -0x1.a2bp-4f, -0x1.2f5p-4f,
    -0x1.ad9p-5f, 0x0p0f,       0x0p0f,        0x0p0f,        0x1.854p-5f,   0x1.261p-4f,  0x1.8p-4f,
    0x1.d2f8p-4f, 0x1.14bcp-3f, 0x1.43b4p-3f,  0x1.6b4cp-3f,  0x1.92bcp-3f,  0x1.bc8cp-3f, 0x1.e7cp-3f,
    0x1.0558p-2f, 0x1.1a34p-2f, 0x1.2c28p-2f,  0x1.4172p-2f,  0x1.5282p-2f,  0x1.6366p-2f, 0x1.763cp-2f,
    0x1.84cep-2f, 0x1.98ccp-2f, 0x0p0f,        -0x1.1a38p-2f};

// For the e of [0, 1] nearest to n / 31: c near 1 / (1 + n / 31), where -log c is nearly a float.
alignas(64) constexpr float unit_inverse[32] = {
    0x1p0f,         0x1p0f,         0x1.e21184p-1f, 0x1.d282fap-1f, 0x1.c68d2ep-1f, 0x1.b97a48p-1f,
    0x1.ad0ad8p-1f, 0x1.a2a91ep-1f, 0x1.95f9f2p-1f, 0x1.8d89d2p-1f, 0x1.84036p-1f,  0x1.796d9ap-1f,
    0x1.71bf34p-1f, 0x1.68b5b4p-1f, 0x1.605a98p-1f, 0x1.599c4cp-1f, 0x1.523da2p-1f, 0x1.4aa436p-1f,
    0x1.4463aap-1f, 0x1.3e1f0ap-1f, 0x1.37f1fcp-1f, 0x1.313f76p-1f, 0x1.2bf912p-1f, 0x1.266a8p-1f,
    0x1.207f1cp-1f, 0x1.1bda48p-1f, 0x1.165c12p-1f, 0x1.1197cap-1f, 0x1.0d01bep-1f, 0x1.08b8a2p-1f,
    0x1.0465b4p-1f, 0x1.01185p-1f};
alignas(64) constexpr float minus_log_unit_inverse[32] = {
    0x0p0f,         0x0p0f,         0x1.ed797p-5f,  0x1.7d1946p-4f, 0x1.e77aa4p-4f, 0x1.2f8204p-3f,
    0x1.6a05dap-3f, 0x1.9c305p-3f,  0x1.db3266p-3f, 0x1.031b22p-2f, 0x1.1bf0aep-2f, 0x1.38435cp-2f,
    0x1.4d516ep-2f, 0x1.66a82ep-2f, 0x1.7ea83ap-2f, 0x1.9271c4p-2f, 0x1.a8842cp-2f, 0x1.bfc8f8p-2f,
    0x1.d35558p-2f, 0x1.e7503ep-2f, 0x1.fb638cp-2f, 0x1.08ce7ep-1f, 0x1.11bb56p-1f, 0x1.1b4e2ep-1f,
    0x1.25b45ap-1f, 0x1.2e035ap-1f, 0x1.3804acp-1f, 0x1.40dca2p-1f, 0x1.49845cp-1f, 0x1.51bd4cp-1f,
    0x1.5a2be6p-1f, 0x1.60b4c2p-1f};

// For the m of [1, 2) nearest to n / 31, at place n mod 32: c near 31 / n, and a multiple of 2^-17 within
// 2^-29 of -log c.
alignas(64) constexpr float far_inverse[32] = {
    0x1.f0252cp-1f, 0x1.e11ba2p-1f, 0x1.d316d2p-1f, 0x1.c54656p-1f, 0x1.b8e4c8p-1f, 0x1.acc68ap-1f,
    0x1.a1677ep-1f, 0x1.971c3ep-1f, 0x1.8cabaap-1f, 0x1.82e412p-1f, 0x1.79c98ep-1f, 0x1.70f7e4p-1f,
    0x1.68b94ap-1f, 0x1.607bb6p-1f, 0x1.5913f8p-1f, 0x1.51917p-1f,  0x1.4a95acp-1f, 0x1.43ee54p-1f,
    0x1.3d7a02p-1f, 0x1.3762ccp-1f, 0x1.3162fp-1f,  0x1.2b88dcp-1f, 0x1.25dfp-1f,   0x1.20c536p-1f,
    0x1.1b7c4ap-1f, 0x1.164626p-1f, 0x1.11a4f4p-1f, 0x1.0d09dp-1f,  0x1.08738ap-1f, 0x1.043352p-1f,
    0x1.0125cp-1f,  0x1.fb97e2p-1f};
alignas(64) constexpr float minus_log_far_inverse[32] = {
    0x1.01bp-5f,  0x1.fddp-5f,  0x1.7808p-4f, 0x1.f3p-4f,   0x1.3238p-3f, 0x1.6b4cp-3f, 0x1.a258p-3f,
    0x1.d57cp-3f, 0x1.0558p-2f, 0x1.1ee8p-2f, 0x1.374ap-2f, 0x1.4f7ap-2f, 0x1.669ep-2f, 0x1.7e48p-2f,
    0x1.9406p-2f, 0x1.aa8ep-2f, 0x1.bff6p-2f, 0x1.d4c8p-2f, 0x1.e964p-2f, 0x1.fd3ap-2f, 0x1.0893p-1f,
    0x1.127bp-1f, 0x1.1c41p-1f, 0x1.2538p-1f, 0x1.2eadp-1f, 0x1.382dp-1f, 0x1.40c4p-1f, 0x1.4975p-1f,
    0x1.5243p-1f, 0x1.5a8fp-1f, 0x1.609ap-1f, 0x1.1b4p-7f};

// For the w of [0, 1/2] nearest to n / 62: c near 1 / (1 - n / 62), where -log c is nearly a float.
alignas(64) constexpr float near_inverse[32] = {
    0x1p0f,        0x1p0f,        0x1.07e68ep0f, 0x1.0d3178p0f, 0x1.114626p0f, 0x1.16417cp0f, 0x1.1b897ap0f,
    0x1.2038fp0f,  0x1.26599cp0f, 0x1.2b011ep0f, 0x1.314398p0f, 0x1.36d51ep0f, 0x1.3d8a14p0f, 0x1.43a6aap0f,
    0x1.49f8p0f,   0x1.51db4ap0f, 0x1.58b90ep0f, 0x1.5fdd12p0f, 0x1.6959c2p0f, 0x1.70a4cap0f, 0x1.79f2cap0f,
    0x1.8371bcp0f, 0x1.8cc584p0f, 0x1.9621bp0f,  0x1.a1c9f8p0f, 0x1.acc0e8p0f, 0x1.b9a188p0f, 0x1.c59d94p0f,
    0x1.d35168p0f, 0x1.e0c97ap0f, 0x1.effdc6p0f, 0x1.fbe45p0f};
alignas(64) constexpr float minus_log_near_inverse[32] = {
    0x0p0f,          0x0p0f,          -0x1.f1fe3ep-6f, -0x1.9baa26p-5f, -0x1.0b7578p-4f, -0x1.5574d8p-4f,
    -0x1.a27806p-4f, -0x1.e599eep-4f, -0x1.1de286p-3f, -0x1.3e03d2p-3f, -0x1.687282p-3f, -0x1.8d7816p-3f,
    -0x1.b93068p-3f, -0x1.e03b78p-3f, -0x1.03e986p-2f, -0x1.1c1a4ep-2f, -0x1.30b474p-2f, -0x1.45b31ap-2f,
    -0x1.60f182p-2f, -0x1.7567a4p-2f, -0x1.8eee1ep-2f, -0x1.a8570ep-2f, -0x1.c0b31ap-2f, -0x1.d89366p-2f,
    -0x1.f58ddap-2f, -0x1.080a76p-1f, -0x1.173132p-1f, -0x1.24e6b2p-1f, -0x1.342364p-1f, -0x1.42afbap-1f,
    -0x1.52a086p-1f, -0x1.5ec442p-1f};

struct Reduced {
    Floats k, high, r;  // x = k ln2 + r, and r before the low part of ln2 is taken from it
};

FUSEDLOSS_INLINE Reduced reduce(Floats x) {
    using F = Format<float>;
    const Floats k = (x * Floats(0x1.715476p0f) + Floats(whole)) - Floats(whole);
    const Floats high = x - k * Floats(F::ln2_hi);
    return {k, high, high - k * Floats(F::ln2_lo)};
}

// y 2^k, but 0 where x < least.
FUSEDLOSS_INLINE Floats scale(Floats y, Floats k, Floats x, float least) {
    return MM(maskz_scalef_ps)(MM(cmp_ps_mask)(x.v, Floats(least).v, _CMP_NLT_UQ), y.v, k.v);
}

// x <= exp_max; -inf only of infinities.
FUSEDLOSS_INLINE Floats exp(Floats x) {
    using F = Format<float>;
    const Reduced s = reduce(x);
    const Floats rr = s.r * s.r;
    const Floats low = rr * exp_tail(s.r, rr) - s.k * Floats(F::ln2_lo);
    return scale(Floats(1.0) + (s.high + low), s.k, x, F::exp_min);
}

// In [3/4, 3/2); NaN where x is negative.
FUSEDLOSS_INLINE Floats mantissa(Floats x) {
    return MM(getmant_ps)(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
}

FUSEDLOSS_INLINE Floats place_of(Floats m) { return m * Floats(41.0) + Floats(whole); }

// k ln2 - log c + log(1 + r)
FUSEDLOSS_INLINE Floats log_sum(Floats k, Floats place, Floats r) {
    using F = Format<float>;
    const Floats low = k * Floats(F::ln2_lo) + short_log1p(r);
    return (k * Floats(F::ln2_hi) + look_up(minus_log_inverse, place)) + low;
}

}  // namespace detail

// 0.91 ULP.
FUSEDLOSS_INLINE Floats exp(Floats x) {
    // The instruction gives its second operand where one is NaN.
    return detail::exp(MM(min_ps)(Floats(detail::Format<float>::exp_max).v, x.v));
}
FUSEDLOSS_INLINE Floats exp_minus_abs(Floats x) { return detail::exp(MM(or_ps)(x.v, Floats(-0.0).v)); }
// 1.03 ULP.
FUSEDLOSS_INLINE Floats exp_softmax(Floats x) {
    const detail::Reduced s = detail::reduce(x);
    const Floats rr = s.r * s.r;
    const Floats y = Floats(1.0) + (s.r + rr * detail::exp_tail(s.r, rr));
    return detail::scale(y, s.k, x, least_normal_exp<float>);
}
FUSEDLOSS_INLINE Floats exp_raised(Floats x) {
    const detail::Reduced s = detail::reduce(x);
    const Floats rr = s.r * s.r, up(raised<float>);
    const Floats y = up + (s.r + rr * detail::exp_tail(s.r, rr)) * up;
    return detail::scale(y, s.k, x, least_raised_exp<float>);
}

// 0.85 ULP. The exponents of 0 and infinity are infinite, their mantissas 1.
FUSEDLOSS_INLINE Floats log(Floats x) {
    const Floats m = detail::mantissa(x), k = Floats(MM(getexp_ps)(x.v)) - Floats(MM(getexp_ps)(m.v));
    const Floats place = detail::place_of(m);
    return detail::log_sum(k, place, m * detail::look_up(detail::inverse, place) - Floats(1.0));
}

// 0.97 ULP.
FUSEDLOSS_INLINE Floats log1p(Floats x) {
    const Floats one(1.0), sign(-0.0);
    const Floats u = one + x, lost = x - (u - one), m = detail::mantissa(u);
    const Floats minus_k = Floats(MM(getexp_ps)(m.v)) - Floats(MM(getexp_ps)(u.v));
    const Floats place = detail::place_of(m), c = detail::look_up(detail::inverse, place);
    const Floats r = Floats(MM(scalef_ps)(lost.v, minus_k.v)) * c + (m * c - one);
    const Floats sum = detail::log_sum(-minus_k, place, r);
    // sum | (x & sign), for -0; then -inf where u is 0, and inf where it is that.
    const Words out = MM(ternarylogic_epi32)(words(sum), words(x), words(sign), 0xF8);
    return MM(fixupimm_ps)(Register(out), u.v, MM(set1_epi32)(0x500400), 0);
}

// The lesser of x and 1 - x is exact: w, of which the logarithm is far from 0, and 1 - w close to 1.
// 0.75 and 0.76 ULP.
FUSEDLOSS_INLINE Logs<Floats> logs_of_parts(Floats x) {
    using namespace detail;
    const Floats one(1.0), rest = one - x, w = MM(min_ps)(x.v, rest.v);

    const Floats m = MM(getmant_ps)(w.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_nan), k = MM(getexp_ps)(w.v);
    const Floats far_place = m * Floats(31.0) + Floats(whole);
    const Floats far_r = m * look_up(far_inverse, far_place) - one, rr = far_r * far_r;
    const Floats tail = polynomial(far_r, rr, Floats(-0.5), Floats(0x1.5566b6p-2f), Floats(-0x1.001294p-2f));
    const Floats low = k * Floats(Format<float>::ln2_lo) + (far_r + rr * tail);
    const Floats far = (k * Floats(Format<float>::ln2_hi) + look_up(minus_log_far_inverse, far_place)) + low;

    const Floats near_place = w * Floats(62.0) + Floats(whole), c = look_up(near_inverse, near_place);
    const Floats near = look_up(minus_log_near_inverse, near_place) + short_log1p((c - one) - w * c);

    const Mask first = x <= rest;
    // log(1 - 0) is -0, as log1p(-0) is.
    return {where(first, far, near), MM(mask_or_ps)(far.v, first.m, near.v, Floats(-0.0).v)};
}

FUSEDLOSS_INLINE Floats log1p_unit(Floats e) {
    const Floats place = e * Floats(31.0) + Floats(detail::whole);
    const Floats c = detail::look_up(detail::unit_inverse, place);
    return detail::look_up(detail::minus_log_unit_inverse, place) +
           detail::short_log1p(e * c + (c - Floats(1.0)));
}

// In double: the compiler makes vectors of these.
FUSEDLOSS_INLINE Floats pow(Floats x, double p) {
    if (p == 2.0) return x * x;
    constexpr int count = sizeof(Register) / sizeof(float);
    float values[count];
    x.store(values);
#pragma omp simd
    for (int i = 0; i < count; ++i) values[i] = pow(values[i], p);
    return Floats::load(values);
}

#undef MM

}  // namespace fusedloss::math

template <>
struct std::numeric_limits<fusedloss::math::Floats> {
    static FUSEDLOSS_INLINE fusedloss::math::Floats infinity() {
        return fusedloss::math::Floats(std::numeric_limits<double>::infinity());
    }
};
