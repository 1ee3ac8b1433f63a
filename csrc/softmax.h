// The passes over a stretch of a row of logits, and what they gather of it.
#pragma once
#include <limits>

#include "grid.h"
#include "libm.h"
#include "math.h"
#include "parallel.h"

namespace fusedloss {

constexpr int64_t row_block = 1024;  // classes at a time

template <class T>
FUSEDLOSS_LOOP T greatest(const T* __restrict x, int64_t n, T start) {
    constexpr int width = 64;  // enough that no comparison waits for the one before
    const auto larger = [](T a, T b) { return b > a ? b : a; };
    if (n < width) {
        T few[width];
        std::fill_n(few, width, start);
        for (int64_t i = 0; i < n; ++i) few[i] = larger(start, x[i]);
        return fold<width>(few, larger);
    }
    T tops[width];
    std::fill_n(tops, width, start);
    const int64_t last = n - width;
    for (int64_t i = 0; i < last; i += width)
        for (int j = 0; j < width; ++j) tops[j] = larger(tops[j], x[i + j]);
    for (int j = 0; j < width; ++j) tops[j] = larger(tops[j], x[last + j]);  // some of them again
    return fold<width>(tops, larger);
}

// The first position where e is that of the maximum, or n.
template <class T>
FUSEDLOSS_LOOP int64_t first_one(const T* __restrict e, int64_t n) {
    constexpr int64_t width = 64;
    int64_t i = 0;
    for (; i + width <= n; i += width) {
        T greatest = 0;
#pragma omp simd reduction(max : greatest)
        for (int64_t j = i; j < i + width; ++j) greatest = e[j] > greatest ? e[j] : greatest;
        if (greatest == math::raised<T>) break;
    }
    while (i < n && e[i] != math::raised<T>) ++i;
    return i;
}

// Also asks for what follows in memory, the next block or row, with elements of `width` bytes, and for where
// its exps go: these leave time for it to arrive.
template <class T>
FUSEDLOSS_LOOP void exp_of_difference(const T* __restrict x, T origin, int64_t n, T* __restrict e,
                                      const void* next, int64_t width) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t whole = n - n % line;
    const auto exp = [origin](auto v) { return math::exp_raised(v - decltype(v)(origin)); };
    for (int64_t i = 0; i < whole; i += line) {
        __builtin_prefetch(static_cast<const char*>(next) + i * width);
        __builtin_prefetch(e + i + n, 1);
        math::map(e + i, line, exp, x + i);
    }
    math::map(e + whole, n - whole, exp, x + whole);
}

// e * factor - flat
template <class T>
FUSEDLOSS_LOOP void scale_and_shift(T* __restrict e, T factor, T flat, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) e[i] = e[i] * factor - flat;
}

// Whether a factor of raised exps, `scale` of the exps themselves, is so small that T has no digits for it.
template <class T>
inline bool too_small(double scale) {
    return scale != 0 && std::fabs(scale * double(math::lowered<T>)) < double(std::numeric_limits<T>::min());
}

// What raised exps are multiplied by for `scale` times the exps; where that is too small, they are lowered.
template <class T>
inline T factor_of_raised(T* e, double scale, int64_t n) {
    if (!too_small<T>(scale)) return T(scale * double(math::lowered<T>));
    scale_and_shift(e, math::lowered<T>, T(0), n);
    return T(scale);
}

// sum * exp(gap), for a sum of raised exps that is brought to a larger maximum: beyond where exp(gap) alone
// has its digits, too.
inline double brought(double sum, double gap) {
    if (gap > -700) return sum * std::exp(gap);
    const double half = std::exp(0.5 * gap);
    return sum * half * half;
}

// e * factor - g * part
template <class T>
FUSEDLOSS_LOOP void scale_and_take(T* __restrict e, T factor, T g, const T* __restrict part, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) e[i] = e[i] * factor - g * part[i];
}

// part becomes (hard * part + soft) * w; a null w is 1.
template <class T>
FUSEDLOSS_LOOP void weigh(T* __restrict part, T hard, T soft, const T* __restrict w, int64_t n) {
    if (hard != T(1) || soft != T(0))
        for (int64_t i = 0; i < n; ++i) part[i] = hard * part[i] + soft;
    if (w)
        for (int64_t i = 0; i < n; ++i) part[i] *= w[i];
}

// What the passes over a row gather, and what the last pass needs of it. The row's own class is the target's,
// or of probabilities the largest: it is kept apart from the others, so that no digits are lost near p = 1.
template <class T>
struct RowSums {
    static constexpr double lowered = math::lowered<T>;
    double max = 0;     // finite, or 0 for a row of -inf
    double others = 0;  // sum of exp(x - max) but for the own class, raised
    double own = 0;     // that of the own class, raised
    double own_x = 0;
    double dot = 0;   // sum of b_c (x_c - max) over the soft part of b
    double mass = 0;  // sum of the soft part of b

    double raised_sum() const { return others + own; }
    double sum() const { return raised_sum() * lowered; }
    bool own_is_largest() const { return own == double(math::raised<T>); }

    // Where the target class is the largest, log1p keeps the digits that 1 + others loses.
    double log_sum() const { return own_is_largest() ? std::log1p(others * lowered) : std::log(sum()); }
    double own_loss() const { return log_sum() + (own_is_largest() ? 0.0 : max - own_x); }
    double soft_loss() const { return mass * log_sum() - dot; }
};

}  // namespace fusedloss
