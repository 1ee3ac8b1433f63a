// THE loop of all pointwise losses: loads, the printed formula, multipliers, stores and ordered sums.
#pragma once
#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <type_traits>

#include "convert.h"
#include "math.h"
#include "parallel.h"

namespace fusedloss {

constexpr int64_t vector = 16;  // elements: of the widest unit, and a multiple of all others

// The order of the strides in `layout`.
enum Slot { OPERAND = 0, MULTIPLIER = formula_operands, LOSS = MULTIPLIER + 2, GRAD = LOSS + 1 };

class Walk {
public:
    explicit Walk(const PointwiseArgs& a) : ndim_(a.ndim), layout_(a.layout) {}

    template <class T>
    const T* load(const Array& array, int slot, int64_t start, int64_t n, T* buffer) const {
        if (ndim_ == 1 && stride(slot, 0) == 1)
            return fusedloss::load<T>(at(array.data, array.dtype, start), array.dtype, 1, n, buffer);
        runs(slot, start, n, [&](int64_t offset, int64_t done, int64_t count, int64_t inner) {
            load_strided<T>(at(array.data, array.dtype, offset), array.dtype, inner, count, buffer + done);
        });
        return buffer;
    }

    // Where to write n results: the tensor's own memory where it serves, `buffer` where not.
    template <class T>
    T* target(const Array& array, int slot, int64_t start, bool whole, T* buffer) const {
        if (!array.data) return nullptr;
        const bool direct = whole && array.dtype == dtype_of<T> && ndim_ == 1 && stride(slot, 0) == 1;
        return direct ? static_cast<T*>(array.data) + start : buffer;
    }

    template <class T>
    void store(const Array& array, int slot, int64_t start, int64_t n, const T* from, const T* buffer) const {
        if (!array.data || from != buffer) return;
        runs(slot, start, n, [&](int64_t offset, int64_t done, int64_t count, int64_t inner) {
            fusedloss::store<T>(at(array.data, array.dtype, offset), array.dtype, inner, count,
                                buffer + done);
        });
    }

private:
    int64_t ndim_;
    const int64_t* layout_;

    int64_t size(int64_t d) const { return layout_[d]; }
    int64_t stride(int slot, int64_t d) const { return layout_[ndim_ * (slot + 1) + d]; }

    // Cuts elements [start, start + n) into runs along the innermost dimension.
    template <class F>
    void runs(int slot, int64_t start, int64_t n, F&& f) const {
        int64_t index[max_dims];
        int64_t rest = start, offset = 0;
        for (int64_t d = ndim_ - 1; d >= 0; --d) {
            index[d] = rest % size(d);
            rest /= size(d);
            offset += index[d] * stride(slot, d);
        }
        const int64_t last = ndim_ - 1;
        for (int64_t done = 0; done < n;) {
            const int64_t count = std::min(n - done, size(last) - index[last]);
            f(offset, done, count, stride(slot, last));
            done += count;
            offset += count * stride(slot, last);
            index[last] += count;
            for (int64_t d = last; d > 0 && index[d] == size(d); --d) {
                offset += stride(slot, d - 1) - size(d) * stride(slot, d);
                index[d] = 0;
                ++index[d - 1];
            }
        }
    }
};

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

// The gradients that a loop computes, as bits: any of the first two, or all. Each costs code.
template <class F, class Use>
void with_gradients(int wanted, Use&& f) {
    constexpr int every = (1 << F::derivatives) - 1;
    switch (wanted) {
        case 0: return f(std::integral_constant<int, 0>());
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2 & every>());
        case 3: return f(std::integral_constant<int, 3 & every>());
        default: return f(std::integral_constant<int, every>());
    }
}

// The last loop, which adds to a sum for each lane. Absent results are not computed: the flags are known to
// the compiler.
template <class F, class T, Losses losses, int grads>
FUSEDLOSS_LOOP void block(const F f, const Operands<T> in, int64_t n, int64_t ahead, T scale,
                          T* __restrict loss, T* __restrict g0, T* __restrict g1, T* __restrict g2,
                          T* __restrict g3, double* __restrict lanes) {
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

template <class T>
FUSEDLOSS_LOOP void multiply(T* __restrict v, const T* __restrict by, int64_t n) {
    if (!v) return;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] *= by[i];
}

// Returns -1, or the position of the first element that lies outside the formula's domain.
template <template <class> class Formula, class T>
int64_t pointwise(const PointwiseArgs& a) {
    using F = Formula<math::Lanes<T>>;
    // With AVX-512 stages take turns with the last loop over less than a block, so that memory is never idle
    // for long: 0.83 to 0.94 of the time beyond the caches.
    constexpr bool wide = math::lanes<T> > 1;
    constexpr int64_t size = 1024;
    constexpr int64_t turn = F::stages > 0 && wide ? 256 : size;
    constexpr int64_t none = std::numeric_limits<int64_t>::max();
    const F f(a.numbers);
    const Walk walk(a);
    const int64_t blocks = (a.numel + size - 1) / size;
    std::vector<double> sums(a.total.data ? size_t(blocks) : 0);
    std::atomic<int64_t> outside{none};
    for (int k = 0; k < F::derivatives; ++k)
        advise_huge_pages(a.grad[k].data, a.numel * size_of(a.grad[k].dtype));
    advise_huge_pages(a.loss.data, a.numel * size_of(a.loss.dtype));

    struct alignas(64) Scratch {
        T in[F::operands][size], by[size], values[size], slopes[F::derivatives][size];
        T staged[F::stages > 0 ? F::stages : 1][turn];
    };
    const auto compute = [&](int64_t b, Scratch& scratch) {
        const int64_t start = b * size, n = std::min(size, a.numel - start);
        auto& [in, by, values, slopes, staged] = scratch;
        const T* x[formula_operands];
        // A remainder loop may round otherwise than the vectors do, and an element's result must not depend
        // on where it stands: the last block is filled up to whole vectors.
        const int64_t padded = (n + vector - 1) / vector * vector;
        for (int k = 0; k < F::operands; ++k) {
            x[k] = walk.load(a.operand[k], OPERAND + k, start, n, in[k]);
            if (padded == n) continue;
            if (x[k] != in[k]) std::copy_n(x[k], n, in[k]);
            std::fill(in[k] + n, in[k] + padded, in[k][0]);
            x[k] = in[k];
        }
        for (int k = F::operands; k < formula_operands; ++k) x[k] = x[0];
        const auto from = [&](int64_t i) {
            const T* first = x[0] + i;
            return Operands<T>{first, x[1] + i, x[2] + i, x[3] + i, first, first, first, first};
        };

        const auto refused = [&]() -> bool {
            int64_t i = n;
            if constexpr (F::has_domain) i = first_outside<Formula<T>, T>(Formula<T>(a.numbers), from(0), n);
            for (int64_t seen = outside.load();
                 i < n && start + i < seen && !outside.compare_exchange_weak(seen, start + i);) {
            }
            return i < n;
        };

        T* loss = walk.target(a.loss, LOSS, start, padded == n, values);
        // The filling must not be summed, nor a loss before its weight.
        const bool summed = a.total.data && !loss && padded == n && !a.multiplier[0].data;
        if (!loss && a.total.data && !summed) loss = values;
        T* g[formula_operands] = {};
        int wanted = 0;
        for (int k = 0; k < F::derivatives; ++k) {
            g[k] = walk.target(a.grad[k], GRAD + k, start, padded == n, slopes[k]);
            wanted |= g[k] ? 1 << k : 0;
        }
        int needs = loss || summed ? F::needs[0] : 0;
        with_gradients<F>(wanted, [&](auto grads) {
            for (int k = 0; k < F::derivatives; ++k) {
                if (!(grads() >> k & 1)) continue;
                if (!g[k]) g[k] = slopes[k];  // computed beside what is wanted
                needs |= F::needs[k + 1];
            }
        });
        const T scale = T(a.grad_scale);
        constexpr bool of_parts = F::of_parts && wide;
        if (!(of_parts && needs) && refused()) return;
        double lanes[vector] = {};
        for (int64_t at = 0; at < padded; at += turn) {
            const int64_t count = std::min(turn, padded - at);
            Operands<T> all = from(at);
            if constexpr (of_parts) {
                if (needs) {
                    const bool inside = stages_of_parts<F, T>(f, all, count, size, staged[0], staged[1]);
                    if (!inside && refused()) return;
                    all.s0 = staged[0], all.s1 = staged[1];
                }
            } else {
                const auto make = [&]<int k>(const T*& s) {
                    if constexpr (k < F::stages)
                        if (needs >> k & 1) stage<F, T, k>(f, all, count, size, staged[k]), s = staged[k];
                };
                make.template operator()<0>(all.s0);
                make.template operator()<1>(all.s1);
                make.template operator()<2>(all.s2);
                make.template operator()<3>(all.s3);
            }
            with_gradients<F>(wanted, [&](auto grads) {
                const auto run = [&](auto losses) {
                    const auto from = [at](T* p) { return p ? p + at : p; };
                    block<F, T, losses(), grads()>(f, all, count, size, scale, from(loss), from(g[0]),
                                                   from(g[1]), from(g[2]), from(g[3]), lanes);
                };
                if (summed)
                    run(std::integral_constant<Losses, SUMMED>());
                else if (loss)
                    run(std::integral_constant<Losses, STORED>());
                else if constexpr (grads() != 0)
                    run(std::integral_constant<Losses, UNUSED>());
            });
        }
        for (int k = 0; k < 2; ++k) {
            if (!a.multiplier[k].data) continue;
            const T* m = walk.load(a.multiplier[k], MULTIPLIER + k, start, n, by);
            if (k == 0) multiply(loss, m, n);
            for (int d = 0; d < F::derivatives; ++d)
                if (a.grad[d].data) multiply(g[d], m, n);
        }
        if (a.total.data) sums[size_t(b)] = summed ? tree_sum(lanes) : ordered_sum(loss, n);
        walk.store(a.loss, LOSS, start, n, loss, values);
        for (int k = 0; k < F::derivatives; ++k) walk.store(a.grad[k], GRAD + k, start, n, g[k], slopes[k]);
    };
    parallel_ranges(blocks, 32, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<Scratch> scratch(new Scratch);  // too large for the stacks of some threads
        for (int64_t b = begin; b < end; ++b) compute(b, *scratch);
    });
    if (outside.load() != none) return outside.load();
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / a.denominator);
    return -1;
}

}  // namespace fusedloss
