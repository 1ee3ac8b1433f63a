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
        // A product of the formula is not contracted with the sum: the bits would depend on the loop around
        // it.
        if constexpr (losses == SUMMED && std::is_same_v<T, double>) asm volatile("" : "+m"(values));
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

constexpr int64_t block_size = 1024;  // elements

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
        with_gradients<F>(b.wanted, [&](auto grads) {
            const auto from = [at](T* p) { return p ? p + at : p; };
            T* const to[] = {from(b.grad[0]), from(b.grad[1]), from(b.grad[2]), from(b.grad[3])};
            const auto run = [&](auto losses) {
                block<F, T, losses(), grads()>(f, all, count, block_size, b.scale, from(b.loss), to, b.lanes);
            };
            if (b.losses == SUMMED)
                run(std::integral_constant<Losses, SUMMED>());
            else if (b.losses == STORED)
                run(std::integral_constant<Losses, STORED>());
            else if constexpr (grads() != 0)
                run(std::integral_constant<Losses, UNUSED>());
        });
    }
    return true;
}

template <template <class> class Formula, class T>
constexpr Loops<T> loops_of = {
    Formula<T>::operands,
    Formula<T>::derivatives,
    Formula<T>::needs,
    Formula<T>::of_parts && (math::lanes<T> > 1),
    outside_if_any<Formula, T>(),
    run_block<Formula, T>,
};

// What a thread keeps: too large for the stacks of some, and to allocate it takes longer than a small loss.
template <class T>
struct alignas(64) Scratch {
    T in[formula_operands][block_size], by[block_size], values[block_size];
    T slopes[formula_operands][block_size], staged[4][block_size];

    static Scratch& of_thread() {
        static thread_local const std::unique_ptr<Scratch> own(new Scratch);
        return *own;
    }
};

template <class T>
class PointwiseKernel {
public:
    PointwiseKernel(const PointwiseArgs& args, const Loops<T>& loops, std::atomic<int64_t>& outside)
        : a(args), f(loops), walk(args), first_outside(outside), scratch(Scratch<T>::of_thread()) {}

    // What the block's losses sum to, if that is asked for.
    double operator()(int64_t number) {
        const int64_t start = number * block_size, n = std::min(block_size, a.numel - start);
        load(start, n);
        const bool whole = b.padded == n;
        b.loss = walk.target(a.loss, LOSS, start, whole, scratch.values);
        // The filling must not be summed, nor a loss before its weight.
        const bool summed = a.total.data && !b.loss && whole && !a.multiplier[0].data;
        if (!b.loss && a.total.data && !summed) b.loss = scratch.values;
        b.losses = summed ? SUMMED : b.loss ? STORED : UNUSED;
        want(start, whole);
        std::fill_n(b.lanes, vector, 0.0);
        if (f.outside && !(f.run_checks && b.needs) && refused(start)) return 0;
        if (!f.run(a.numbers, b)) return refused(start), 0;
        weigh(start, n);
        walk.store(a.loss, LOSS, start, n, b.loss, scratch.values);
        for (int k = 0; k < f.derivatives; ++k)
            walk.store(a.grad[k], GRAD + k, start, n, b.grad[k], scratch.slopes[k]);
        return !a.total.data ? 0 : summed ? tree_sum(b.lanes) : ordered_sum(b.loss, n);
    }

private:
    const PointwiseArgs& a;
    const Loops<T>& f;
    const Walk walk;
    std::atomic<int64_t>& first_outside;
    Scratch<T>& scratch;
    Block<T> b;

    // A remainder loop may round otherwise than the vectors do, and an element's result must not depend on
    // where it stands: the last block is filled up to whole vectors.
    void load(int64_t start, int64_t n) {
        b.n = n;
        b.padded = (n + vector - 1) / vector * vector;
        b.scale = T(a.grad_scale);
        b.staged = scratch.staged;
        for (int k = 0; k < f.operands; ++k) {
            b.x[k] = walk.load(a.operand[k], OPERAND + k, start, n, scratch.in[k]);
            if (b.padded == n) continue;
            if (b.x[k] != scratch.in[k]) std::copy_n(b.x[k], n, scratch.in[k]);
            std::fill(scratch.in[k] + n, scratch.in[k] + b.padded, scratch.in[k][0]);
            b.x[k] = scratch.in[k];
        }
        for (int k = f.operands; k < formula_operands; ++k) b.x[k] = b.x[0];
    }

    // Which gradients are computed, where they go, and which stages that takes.
    void want(int64_t start, bool whole) {
        b.wanted = 0;
        b.needs = b.losses == UNUSED ? 0 : f.needs[0];
        for (int k = 0; k < formula_operands; ++k) {
            b.grad[k] = k < f.derivatives ? walk.target(a.grad[k], GRAD + k, start, whole, scratch.slopes[k])
                                          : nullptr;
            b.wanted |= b.grad[k] ? 1 << k : 0;
        }
        const int computed = b.wanted < 4 ? b.wanted : (1 << f.derivatives) - 1;
        for (int k = 0; k < f.derivatives; ++k) {
            if (!(computed >> k & 1)) continue;
            if (!b.grad[k]) b.grad[k] = scratch.slopes[k];  // computed beside what is wanted
            b.needs |= f.needs[k + 1];
        }
    }

    bool refused(int64_t start) {
        const int64_t i = f.outside(a.numbers, b);
        for (int64_t seen = first_outside.load();
             i < b.n && start + i < seen && !first_outside.compare_exchange_weak(seen, start + i);) {
        }
        return i < b.n;
    }

    void weigh(int64_t start, int64_t n) {
        for (int k = 0; k < 2; ++k) {
            if (!a.multiplier[k].data) continue;
            const T* m = walk.load(a.multiplier[k], MULTIPLIER + k, start, n, scratch.by);
            if (k == 0) multiply(b.loss, m, n);
            for (int d = 0; d < f.derivatives; ++d)
                if (a.grad[d].data) multiply(b.grad[d], m, n);
        }
    }
};

// Returns -1, or the position of the first element that lies outside the formula's domain.
template <class T>
int64_t pointwise(const PointwiseArgs& a, const Loops<T>& loops) {
    constexpr int64_t none = std::numeric_limits<int64_t>::max();
    const int64_t blocks = (a.numel + block_size - 1) / block_size;
    std::vector<double> sums(a.total.data ? size_t(blocks) : 0);
    std::atomic<int64_t> outside{none};
    for (const Array& grad : a.grad) advise_huge_pages(grad.data, a.numel * size_of(grad.dtype));
    advise_huge_pages(a.loss.data, a.numel * size_of(a.loss.dtype));
    parallel_ranges(blocks, 32, [&](int64_t begin, int64_t end) {
        PointwiseKernel<T> kernel(a, loops, outside);
        for (int64_t b = begin; b < end; ++b) {
            const double sum = kernel(b);
            if (a.total.data) sums[size_t(b)] = sum;
        }
    });
    if (outside.load() != none) return outside.load();
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / a.denominator);
    return -1;
}

}  // namespace fusedloss
