// What all pointwise losses share: loads, multipliers, stores and ordered sums around a formula's loops.
#pragma once
#include <algorithm>
#include <memory>

#include "convert.h"
#include "formula.h"
#include "parallel.h"

namespace fusedloss {

// The order of the strides in `layout`.
enum Slot { OPERAND = 0, MULTIPLIER = formula_operands, LOSS = MULTIPLIER + 2, GRAD = LOSS + 1 };

class Walk {
public:
    explicit Walk(const PointwiseArgs& a) : ndim_(a.ndim), layout_(a.layout) {}

    template <class T>
    const T* load(const Array& array, int slot, int64_t start, int64_t n, T* buffer) const {
        if (dense(slot)) {
            const void* from = at(array.data, array.dtype, start);
            const bool done = with_half(array.dtype, [&](auto half) {
                convert_and_ask(static_cast<const decltype(half)*>(from), buffer, n);
            });
            return done ? buffer : fusedloss::load<T>(from, array.dtype, 1, n, buffer);
        }
        runs(slot, start, n, [&](int64_t offset, int64_t done, int64_t count, int64_t inner) {
            load_strided<T>(at(array.data, array.dtype, offset), array.dtype, inner, count, buffer + done);
        });
        return buffer;
    }

    // Where to write n results: the tensor's own memory where it serves, `buffer` where not.
    template <class T>
    T* target(const Array& array, int slot, int64_t start, bool whole, T* buffer) const {
        if (!array.data) return nullptr;
        const bool direct = whole && array.dtype == dtype_of<T> && dense(slot);
        return direct ? static_cast<T*>(array.data) + start : buffer;
    }

    template <class T>
    void store(const Array& array, int slot, int64_t start, int64_t n, const T* from, const T* buffer) const {
        if (!array.data || from != buffer) return;
        void* to = at(array.data, array.dtype, start);
        const auto convert = [&](auto half) { convert_and_ask(buffer, static_cast<decltype(half)*>(to), n); };
        if (dense(slot) && with_half(array.dtype, convert)) return;
        runs(slot, start, n, [&](int64_t offset, int64_t done, int64_t count, int64_t inner) {
            fusedloss::store<T>(at(array.data, array.dtype, offset), array.dtype, inner, count,
                                buffer + done);
        });
    }

private:
    int64_t ndim_;
    const int64_t* layout_;

    int64_t size(int64_t d) const { return layout_[d]; }
    bool dense(int slot) const { return ndim_ == 1 && stride(slot, 0) == 1; }
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

template <class T>
FUSEDLOSS_LOOP void multiply(T* __restrict v, const T* __restrict by, int64_t n) {
    if (!v) return;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) v[i] *= by[i];
}

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
    PointwiseKernel(const PointwiseArgs& args, const Loops<T>& loops, FirstWrong& outside)
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
    FirstWrong& first_outside;
    Scratch<T>& scratch;
    Block<T> b;

    // A remainder loop may round otherwise than the vectors do, and an element's result must not depend on
    // where it stands: the last block is filled up to whole vectors.
    void load(int64_t start, int64_t n) {
        b.n = n;
        b.padded = (n + vector - 1) / vector * vector;
        b.scale = T(a.grad_scale);
        b.values = scratch.values;
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
        const bool alone = !b.wanted || (own_loops<T> && b.wanted == 1);
        const int computed = alone ? b.wanted : (1 << f.derivatives) - 1;
        for (int k = 0; k < f.derivatives; ++k) {
            if (!(computed >> k & 1)) continue;
            if (!b.grad[k]) b.grad[k] = scratch.slopes[k];  // computed beside what is wanted
            b.needs |= f.needs[k + 1];
        }
    }

    bool refused(int64_t start) {
        const int64_t i = f.outside(a.numbers, b);
        if (i < b.n) first_outside.note(start + i);
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
    const int64_t blocks = (a.numel + block_size - 1) / block_size;
    std::vector<double> sums(a.total.data ? size_t(blocks) : 0);
    FirstWrong outside;
    for (const Array& grad : a.grad) advise_huge_pages(grad.data, a.numel * size_of(grad.dtype));
    advise_huge_pages(a.loss.data, a.numel * size_of(a.loss.dtype));
    parallel_ranges(blocks, 32, [&](int64_t begin, int64_t end) {
        PointwiseKernel<T> kernel(a, loops, outside);
        for (int64_t b = begin; b < end; ++b) {
            const double sum = kernel(b);
            if (a.total.data) sums[size_t(b)] = sum;
        }
    });
    if (outside.position() >= 0) return outside.position();
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / a.denominator);
    return -1;
}

}  // namespace fusedloss
