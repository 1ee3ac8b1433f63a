// A formula's own loops, of which pointwise.h makes a kernel: its stages, its domain, its values and
// gradients.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>

#include "args.h"
#include "math.h"
#include "parallel.h"

namespace fusedloss {

constexpr int64_t vector = 16;        // elements: of the widest unit, and a multiple of all others
constexpr int64_t block_size = 1024;  // elements

// Each loop costs code: what a training step asks for has its own here, all else is made of two.
#if defined(FUSEDLOSS_FEW_LOOPS)
template <class T>
constexpr bool own_loops = false;
#else
template <class T>
constexpr bool own_loops = std::is_same_v<T, float>;
#endif

// A block's operands and, computed from them, its stages; what is absent repeats the first.
template <class T>
struct Operands {
    const T *x, *y, *z, *w, *s0, *s1, *s2, *s3;
};

// The loops ask for what the next block reads and writes, each for a part: asked for at once, it would fill
// the buffers of lines on their way.
inline void fetch(const void* p) { __builtin_prefetch(p); }
inline void fetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

// A stage of a formula: a long chain of instructions, of which a loop of its own overlaps more.
template <class F, class T, int k>
FUSEDLOSS_LOOP void stage(const F f, const Operands<T> in, int64_t n, int64_t ahead, T* __restrict out) {
    const T* __restrict x = in.x, * __restrict y = in.y, * __restrict z = in.z, * __restrict w = in.w;
    const T* __restrict s0 = in.s0, * __restrict s1 = in.s1, * __restrict s2 = in.s2;
    for (int64_t i = 0; i < n; i += vector) {
        if constexpr (k == 0) fetch(x + i + ahead);
        if constexpr (k == F::stages - 1) fetch(y + i + ahead);
#pragma omp simd
        for (int64_t j = i; j < i + vector; j += math::lanes<T>) {
            const auto at = [j](const T* p) { return math::get(p + j); };
            math::put(out + j,
                      f.template stage<k>(at(x), at(y), at(z), at(w), at(s0), at(s1), at(s2), at(s0)));
        }
    }
}

// Two stages at once, log x and log(1 - x): with the registers of AVX-512 faster than one by one. Whether all
// elements lie inside the formula's domain.
template <class F, class T>
FUSEDLOSS_LOOP bool stages_of_parts(const F f, const Operands<T> in, int64_t n, int64_t ahead,
                                    T* __restrict part, T* __restrict rest) {
    const T* __restrict x = in.x, * __restrict y = in.y, * __restrict z = in.z, * __restrict w = in.w;
    const auto lie = [&](int64_t i) {
        return f.domain(math::get(x + i), math::get(y + i), math::get(z + i), math::get(w + i));
    };
    auto inside = lie(0);
    for (int64_t i = 0; i < n; i += math::lanes<T>) {
        fetch(x + i + ahead);
        fetch(y + i + ahead);
        const auto logs = math::logs_of_parts(math::get(x + i));
        math::put(part + i, logs.part);
        math::put(rest + i, logs.rest);
        inside = inside & lie(i);
    }
    return all(inside);
}

enum Losses { UNUSED, STORED, SUMMED };

// The last loop, which adds to a sum for each lane. Absent results are not computed: the flags are known to
// the compiler.
template <class F, class T, Losses losses, int grads>
FUSEDLOSS_LOOP void block(const F f, const Operands<T>& in, int64_t n, int64_t ahead, T scale,
                          T* __restrict loss, T* const (&g)[formula_operands], double* __restrict lanes) {
    T* __restrict g0 = g[0], * __restrict g1 = g[1], * __restrict g2 = g[2], * __restrict g3 = g[3];
    const T* __restrict x = in.x, * __restrict y = in.y, * __restrict z = in.z, * __restrict w = in.w;
    const T* __restrict s0 = in.s0, * __restrict s1 = in.s1, * __restrict s2 = in.s2, * __restrict s3 = in.s3;
    double sums[vector];
    if constexpr (losses == SUMMED) std::copy_n(lanes, vector, sums);
    for (int64_t i = 0; i < n; i += vector) {
        if constexpr (F::stages == 0) fetch(x + i + ahead);
        if constexpr (F::stages == 0) fetch(y + i + ahead);
        if constexpr (grads & 1) fetch_to_write(g0 + i + ahead);
        T values[vector];
#pragma omp simd
        for (int64_t j = i; j < i + vector; j += math::lanes<T>) {
            const auto at = [j](const T* p) { return math::get(p + j); };
            if constexpr (losses != UNUSED)
                math::put(values + (j - i),
                          f.value(at(x), at(y), at(z), at(w), at(s0), at(s1), at(s2), at(s3)));
            if constexpr (grads != 0) {
                math::Lanes<T> d0, d1, d2, d3;
                f.grad(at(x), at(y), at(z), at(w), at(s0), at(s1), at(s2), at(s3), d0, d1, d2, d3);
                if constexpr (grads & 1) math::put(g0 + j, d0 * math::Lanes<T>(scale));
                if constexpr (grads & 2) math::put(g1 + j, d1 * math::Lanes<T>(scale));
                if constexpr (grads & 4) math::put(g2 + j, d2 * math::Lanes<T>(scale));
                if constexpr (grads & 8) math::put(g3 + j, d3 * math::Lanes<T>(scale));
            }
        }
        for (int64_t j = 0; j < vector; ++j) {
            if constexpr (losses == STORED) loss[i + j] = values[j];
            if constexpr (losses == SUMMED) sums[j] += double(values[j]);
        }
    }
    if constexpr (losses == SUMMED) std::copy_n(sums, vector, lanes);
}

template <class T>
FUSEDLOSS_LOOP void add_to_lanes(const T* __restrict values, int64_t n, double* __restrict lanes) {
    double sums[vector];
    std::copy_n(lanes, vector, sums);
    for (int64_t i = 0; i < n; i += vector)
        for (int64_t j = 0; j < vector; ++j) sums[j] += double(values[i + j]);
    std::copy_n(sums, vector, lanes);
}

// The first element outside the formula's domain, or n.
template <class F, class T>
FUSEDLOSS_LOOP int64_t first_outside(const F f, const Operands<T> in, int64_t n) {
    const T* __restrict x = in.x, * __restrict y = in.y, * __restrict z = in.z, * __restrict w = in.w;
    int32_t bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t i = 0; i < n; ++i) bad |= f.domain(x[i], y[i], z[i], w[i]) ? 0 : 1;
    int64_t i = 0;
    while (bad && f.domain(x[i], y[i], z[i], w[i])) ++i;
    return bad ? i : n;
}

// A block of operands, filled up to whole vectors, and where its results go.
template <class T>
struct Block {
    const T* x[formula_operands];
    int64_t n, padded;
    Losses losses;
    T* loss;
    T* grad[formula_operands];
    int wanted;  // gradients, as bits
    int needs;   // stages, as bits
    T scale;
    double lanes[vector];
    T* values;  // a block of its own
    T (*staged)[block_size];

    Operands<T> from(int64_t i) const {
        const T* first = x[0] + i;
        return {first, x[1] + i, x[2] + i, x[3] + i, first, first, first, first};
    }
};

// A formula's own loops, behind pointers, so that all formulas share what is around them.
template <class T>
struct Loops {
    int operands, derivatives;
    const int* needs;  // stages, as bits: of the value, of each gradient
    bool run_checks;   // `run` finds what lies outside the domain
    // The first element of a block outside the domain, or n; null without a domain.
    int64_t (*outside)(const double* numbers, const Block<T>& b);
    bool (*run)(const double* numbers, Block<T>& b);
};

template <template <class> class Formula, class T>
int64_t outside_of(const double* numbers, const Block<T>& b) {
    return first_outside<Formula<T>, T>(Formula<T>(numbers), b.from(0), b.n);
}

template <template <class> class Formula, class T>
constexpr auto outside_if_any() -> int64_t (*)(const double*, const Block<T>&) {
    if constexpr (Formula<T>::has_domain)
        return outside_of<Formula, T>;
    else
        return nullptr;
}

// The stages and the last loop of a block. False where an element lies outside the domain.
template <template <class> class Formula, class T>
bool run_block(const double* numbers, Block<T>& b) {
    using F = Formula<math::Lanes<T>>;
    // With AVX-512 stages take turns with the last loop over less than a block, so that memory is never idle
    // for long: 0.83 to 0.94 of the time beyond the caches.
    constexpr bool wide = math::lanes<T> > 1;
    constexpr int64_t turn = F::stages > 0 && wide ? 256 : block_size;
    const F f(numbers);
    for (int64_t at = 0; at < b.padded; at += turn) {
        const int64_t count = std::min(turn, b.padded - at);
        Operands<T> all = b.from(at);
        if constexpr (F::of_parts && wide) {
            if (b.needs) {
                T *part = b.staged[0], *rest = b.staged[1];
                const bool inside = stages_of_parts<F, T>(f, all, count, block_size, part, rest);
                if (!inside && outside_of<Formula, T>(numbers, b) < b.n) return false;
                all.s0 = part, all.s1 = rest;
            }
        } else {
            const auto make = [&]<int k>(const T*& s) {
                if constexpr (k < F::stages)
                    if (b.needs >> k & 1)
                        stage<F, T, k>(f, all, count, block_size, b.staged[k]), s = b.staged[k];
            };
            make.template operator()<0>(all.s0);
            make.template operator()<1>(all.s1);
            make.template operator()<2>(all.s2);
            make.template operator()<3>(all.s3);
        }
        const auto from = [at](T* p) { return p ? p + at : p; };
        T* const to[] = {from(b.grad[0]), from(b.grad[1]), from(b.grad[2]), from(b.grad[3])};
        const auto run = [&]<Losses losses, int grads>(T* loss) {
            block<F, T, losses, grads>(f, all, count, block_size, b.scale, loss, to, b.lanes);
        };
        constexpr int every = (1 << F::derivatives) - 1;
        if constexpr (own_loops<T>) {
            if (b.losses == SUMMED && b.wanted == 1) {
                run.template operator()<SUMMED, 1>(nullptr);
                continue;
            }
            if (b.losses == SUMMED) run.template operator()<SUMMED, 0>(nullptr);
        } else if (b.losses == SUMMED) {
            run.template operator()<STORED, 0>(b.values);
            add_to_lanes(b.values, count, b.lanes);
        }
        if (b.losses == STORED) run.template operator()<STORED, 0>(from(b.loss));
        if (own_loops<T> && b.wanted == 1)
            run.template operator()<UNUSED, 1>(nullptr);
        else if (b.wanted)
            run.template operator()<UNUSED, every>(nullptr);
    }
    return true;
}

template <template <class> class F, class T>
constexpr Loops<T> loops_of = {
    F<T>::operands,         F<T>::derivatives, F<T>::needs, F<T>::of_parts && (math::lanes<T> > 1),
    outside_if_any<F, T>(), run_block<F, T>,
};

struct Formula {
    Loops<float> narrow;
    Loops<double> wide;
};

// What a printed unit says of each of its formulas.
#define FUSEDLOSS_FORMULA(name) \
    extern const Formula formula_##name = {loops_of<formulas::name, float>, loops_of<formulas::name, double>};

}  // namespace fusedloss
