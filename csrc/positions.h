// The loops over the positions of a tile of logits, a class at a time.
#pragma once
#include "focal.h"
#include "labels.h"
#include "softmax.h"

namespace fusedloss {

template <class T>
FUSEDLOSS_LOOP void raise(T* __restrict max, const T* __restrict x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) max[i] = x[i] > max[i] ? x[i] : max[i];
}

template <class T, class Index>
FUSEDLOSS_LOOP void raise(T* __restrict max, Index* __restrict largest, const T* __restrict x, Index c,
                          int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        largest[i] = x[i] > max[i] ? c : largest[i];
        max[i] = x[i] > max[i] ? x[i] : max[i];
    }
}

template <class T>
FUSEDLOSS_LOOP void exp_in_place(T* __restrict x, const T* __restrict max, int64_t n) {
    math::map(x, n, [](auto v, auto top) { return math::exp_raised(v - top); }, x, max);
}

template <class T>
FUSEDLOSS_LOOP void add(double* __restrict sums, const T* __restrict e, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += double(e[i]);
}

// Of four classes, `width` apart: see quick_sum.
template <class T>
FUSEDLOSS_LOOP void add_four(double* __restrict sums, const T* __restrict e, int64_t width, int64_t n) {
    const T* __restrict e1 = e + width, * __restrict e2 = e1 + width, * __restrict e3 = e2 + width;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += double((e[i] + e1[i]) + (e2[i] + e3[i]));
}

template <class T, class Index>
FUSEDLOSS_LOOP void add_but_largest(double* __restrict sums, const T* __restrict part,
                                    const Index* __restrict largest, Index c, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += double(largest[i] == c ? T(0) : part[i]);
}

template <class T>
FUSEDLOSS_LOOP void add_products(double* __restrict dots, const T* __restrict part, const T* __restrict x,
                                 const T* __restrict max, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const double term = double(part[i]) * (double(x[i]) - double(max[i]));
        dots[i] += part[i] == T(0) && x[i] == x[i] ? 0.0 : term;
    }
}

// What TileKernel knows of the positions of a tile. The own class is as in RowSums.
template <class T>
struct Positions {
    static constexpr int64_t most = 256, ignored = -2;
    alignas(64) int64_t y[most];
    alignas(64) T max[most], own_x[most], own[most], factor[most], lowering[most], g[most];
    alignas(64) double weight[most], others[most], dots[most], masses[most], rest[most];
    alignas(64) double log_sum[most], incoming[most];
};

// The labels to ignore become `mark`; whether there are any.
FUSEDLOSS_LOOP inline bool mark_ignored(int64_t* __restrict y, int64_t n, int64_t ignore_index,
                                        int64_t mark) {
    int64_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < n; ++i) {
        any |= y[i] == ignore_index;
        y[i] = y[i] == ignore_index ? mark : y[i];
    }
    return any != 0;
}

// tile[y_i][i]
template <class T>
FUSEDLOSS_LOOP void own_logits(Positions<T>& p, const T* __restrict tile, int64_t width, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        p.own_x[i] = p.y[i] >= 0 ? tile[p.y[i] * width + i] : -std::numeric_limits<T>::infinity();
}

// tile[y_i][i] = value(i)
template <class T, class Value>
FUSEDLOSS_LOOP void set_own(const int64_t* __restrict y, int64_t n, const Value& value, T* __restrict tile,
                            int64_t width) {
    for (int64_t i = 0; i < n; ++i)
        if (y[i] >= 0) tile[y[i] * width + i] = value(i);
}

template <class T>
FUSEDLOSS_LOOP void own_exps(Positions<T>& p, int64_t n) {
    math::map(p.own, n, [](auto v, auto top) { return math::exp_raised(v - top); }, p.own_x, p.max);
}

// log1p keeps the digits near certainty, where the own class is the largest.
template <class T, bool indices, bool soft>
FUSEDLOSS_LOOP void position_losses(Positions<T>& p, int64_t n, double hard, double* __restrict losses) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        constexpr double lowered = math::lowered<T>;
        const double log_sum = math::log1p(p.others[i] * lowered + (double(p.own[i]) * lowered - 1.0));
        p.log_sum[i] = log_sum;
        double loss = 0;
        if constexpr (indices) {
            const double behind = p.own[i] == math::raised<T> ? 0.0 : double(p.max[i]) - double(p.own_x[i]);
            loss = hard * p.weight[i] * (log_sum + behind);
        }
        if constexpr (soft) loss += p.masses[i] * log_sum - p.dots[i];
        losses[i] = p.y[i] == p.ignored ? 0.0 : loss;
    }
}

// Of the focal loss: the losses, and the weights by which the gradient sees the own class.
template <class T>
FUSEDLOSS_LOOP void focus(Positions<T>& p, int64_t n, double gamma, double* __restrict losses) {
    with_power(gamma, [&](auto square) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const double own = double(p.own[i]), sum = p.others[i] + own;
            const double behind = p.own[i] == math::raised<T> ? 0.0 : double(p.max[i]) - double(p.own_x[i]);
            const double surprise = p.log_sum[i] + behind;
            const Focal f = focal<decltype(square)::value>(own / sum, p.others[i] / sum, surprise, gamma);
            losses[i] = p.y[i] == p.ignored ? 0.0 : f.value * losses[i];
            p.weight[i] *= f.slope;
        }
    });
}

// Of the focal loss with a soft part, class c, which has the weight `flat` and of its own positions `hard`
// more: its share of the losses, and what the gradient takes of it in place of b_c. `part` has x - max, `e`
// the exps but for the own class. A class that is certain has 1 - p from the other's exps.
template <class T, class Index>
FUSEDLOSS_LOOP void focus_part(Positions<T>& p, const T* __restrict e, const Index* __restrict largest,
                               Index c, double hard, double flat, double gamma, int64_t n, T* __restrict part,
                               double* __restrict losses) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const bool is_own = p.y[i] == c;
        const double own = double(p.own[i]), sum = p.others[i] + own;
        const double here = is_own ? own : double(e[i]);
        const double rest = largest[i] == c ? p.dots[i] : is_own ? p.others[i] : sum - here;
        const double surprise = p.log_sum[i] - double(part[i]);
        const Focal f = focal<false>(here / sum, rest / sum, surprise, gamma);
        const double b = flat + (is_own ? hard : 0.0), slope = b * f.slope;
        losses[i] += p.y[i] == p.ignored || (b == 0 && part[i] == part[i]) ? 0.0 : b * f.value * surprise;
        part[i] = T(slope);
        p.masses[i] += slope;
        p.rest[i] += largest[i] == c ? 0.0 : slope;
    }
}

// The sums of all but the largest class, and the logarithm of that with it.
template <class T, class Index>
FUSEDLOSS_LOOP void rest_of_largest(Positions<T>& p, const Index* __restrict largest, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        p.dots[i] = largest[i] == p.y[i] ? p.others[i] : p.rest[i] + double(p.own[i]);
        p.log_sum[i] = math::log1p(p.dots[i] * math::lowered<T>);
        p.rest[i] = 0;
    }
}

// From what arrives: the factor of the raised exps, and the own class's gradient, p - 1 as minus the others'
// share. Whether the exps must be lowered, by `lowering`, since a factor would be too small.
template <class T, bool indices, bool soft>
FUSEDLOSS_LOOP bool position_slopes(Positions<T>& p, int64_t n, double hard, double smooth) {
    constexpr double lowered = math::lowered<T>, least = std::numeric_limits<T>::min();
    int64_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < n; ++i) {
        const double in = p.y[i] == p.ignored ? 0.0 : p.incoming[i];
        const double mass = soft ? p.masses[i] : 0.0, own_weight = indices ? hard * p.weight[i] : 0.0;
        const double others = p.others[i] * lowered, own = double(p.own[i]) * lowered;
        const double scale = in / (others + own);
        const double factor = scale * (own_weight + mass);
        const bool small = math::abs(factor * lowered) < least;
        p.g[i] = T(in);
        p.factor[i] = T(small ? factor : factor * lowered);
        p.lowering[i] = small ? math::lowered<T> : T(1);
        any |= small && factor != 0;
        p.own[i] = indices ? T(scale * (mass * own - own_weight * others) - in * smooth * p.weight[i])
                           : T(in * p.rest[i] - scale * mass * others);
    }
    return any != 0;
}

// f(i) for all i < n, vector by vector, while the line of `next` that lies as far on is asked for, to read or
// to write.
template <class T, bool to_write, class F>
inline void each_ahead(int64_t n, const T* next, F f) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t whole = n - n % line;
    for (int64_t i = 0; i < whole; i += line) {
        __builtin_prefetch(next + i, to_write);
#pragma omp simd
        for (int64_t j = i; j < i + line; ++j) f(j);
    }
#pragma omp simd
    for (int64_t i = whole; i < n; ++i) f(i);
}

template <class T>
FUSEDLOSS_LOOP void copy_and_raise(const T* __restrict from, int64_t n, T* __restrict to, T* __restrict max,
                                   const T* next) {
    each_ahead<T, false>(n, next, [=](int64_t i) {
        to[i] = from[i];
        max[i] = from[i] > max[i] ? from[i] : max[i];
    });
}

// e * factor - g * part, or e * factor; `out` may be `e`.
template <class T>
FUSEDLOSS_LOOP void slope(const T* e, const T* factor, const T* g, const T* part, int64_t n, T* out,
                          const T* next) {
    each_ahead<T, true>(n, next, [=](int64_t i) { out[i] = e[i] * factor[i] - g[i] * part[i]; });
}

template <class T>
FUSEDLOSS_LOOP void multiply_each(const T* e, const T* factor, int64_t n, T* out, const T* next) {
    each_ahead<T, true>(n, next, [=](int64_t i) { out[i] = e[i] * factor[i]; });
}

}  // namespace fusedloss
