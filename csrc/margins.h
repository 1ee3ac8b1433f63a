// Losses of margins: of each label of a row, by how much each other class comes near it or passes it; with
// the gradient from the same pass.
#pragma once
#include <vector>

#include "convert.h"
#include "parallel.h"

namespace fusedloss {

// Sums over the classes that are no label.
struct Passed {
    double loss;   // of the gaps, or their squares
    double slope;  // of their derivatives
};

// Of one label, whose input is `own`; adds the derivatives to g, unless that is null. `live` is 0 for labels.
template <bool squared, bool wanted, class T>
FUSEDLOSS_LOOP Passed pass(const T* __restrict x, const T* __restrict live, T own, T margin, int64_t n,
                           T* __restrict g) {
    constexpr int64_t width = 32;
    double losses[width] = {};
    T slopes[width] = {};
    const auto add = [&](int64_t i, int64_t j) {
        const T gap = margin + (x[i] - own);
        const bool counts = live[i] != T(0) && !(gap <= T(0));
        const T term = counts ? gap : T(0);
        losses[j] += squared ? double(term) * double(term) : double(term);
        if constexpr (wanted) {
            const T slope = squared ? T(2) * term : counts ? T(1) : T(0);
            g[i] += slope;
            slopes[j] += slope;
        }
    };
    const int64_t whole = n - n % width;
    for (int64_t i = 0; i < whole; i += width)
        for (int64_t j = 0; j < width; ++j) add(i + j, j);
    for (int64_t i = whole; i < n; ++i) add(i, i - whole);
    return {tree_sum(losses), ordered_sum(slopes, width)};
}

template <class T>
FUSEDLOSS_LOOP void scale_all(T* __restrict g, T factor, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) g[i] *= factor;
}

// Whether all labels lie in [least, classes).
FUSEDLOSS_LOOP inline bool all_within(const int64_t* __restrict y, int64_t n, int64_t least,
                                      int64_t classes) {
    int64_t bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t i = 0; i < n; ++i) bad |= int64_t(y[i] < least) | int64_t(y[i] >= classes);
    return bad == 0;
}

// A row at a time, with its buffers.
template <class T>
class MarginRows {
public:
    explicit MarginRows(const MarginArgs& args)
        : a_(args),
          x_(size_t(a_.classes)),
          live_(size_t(a_.classes), T(1)),
          g_(size_t(a_.classes)),
          y_(size_t(a_.labels)) {}

    // The loss of a row. `outside` notes its first position whose label is out of range, if there is one.
    double operator()(int64_t row, FirstWrong& outside) {
        const Matrix &m = a_.input, &t = a_.target;
        load_indices(t.data, t.dtype, row * t.row_stride, t.stride, a_.labels, y_.data());
        const int64_t least = a_.sets ? -1 : 0;
        if (!all_within(y_.data(), a_.labels, least, a_.classes)) {
            int64_t k = 0;
            while (y_[size_t(k)] >= least && y_[size_t(k)] < a_.classes) ++k;
            outside.note(row * a_.labels + k);
            return 0;
        }
        int64_t count = 0;
        while (count < a_.labels && y_[size_t(count)] >= 0) ++count;
        const void* from = at(m.data, m.dtype, row * m.row_stride);
        const T* x = load<T>(from, m.dtype, m.stride, a_.classes, x_.data());
        return of_labels(row, x, count);
    }

private:
    const MarginArgs& a_;
    std::vector<T> x_, live_, g_;
    std::vector<int64_t> y_;

    double of_labels(int64_t row, const T* x, int64_t count) {
        const Matrix& grad = a_.grad;
        void* to = grad.data ? at(grad.data, grad.dtype, row * grad.row_stride) : nullptr;
        const bool direct = to && grad.dtype == dtype_of<T> && grad.stride == 1;
        T* g = !to ? nullptr : direct ? static_cast<T*>(to) : g_.data();
        if (g) std::fill_n(g, a_.classes, T(0));
        for (int64_t k = 0; k < count; ++k) live_[size_t(y_[size_t(k)])] = T(0);
        double loss = 0;
        for (int64_t k = 0; k < count; ++k) {
            const int64_t y = y_[size_t(k)];
            const Passed found = of_label(x, x[y], g);
            loss += found.loss;
            if (g) g[y] -= T(found.slope);
        }
        for (int64_t k = 0; k < count; ++k) live_[size_t(y_[size_t(k)])] = T(1);
        const double w = a_.weight.data ? load_one(a_.weight.data, a_.weight.dtype, y_[0]) : 1.0;
        const double share = w / double(a_.classes);
        if (!g) return loss * share;
        double scale = a_.grad_scale * share;
        const Matrix& incoming = a_.incoming;
        if (incoming.data) scale *= load_one(incoming.data, incoming.dtype, row * incoming.row_stride);
        scale_all(g, T(scale), a_.classes);
        if (!direct) store(to, grad.dtype, grad.stride, a_.classes, g);
        return loss * share;
    }

    Passed of_label(const T* x, T own, T* g) const {
        const T* live = live_.data();
        const T margin = T(a_.margin);
        if (a_.squared)
            return g ? pass<true, true>(x, live, own, margin, a_.classes, g)
                     : pass<true, false>(x, live, own, margin, a_.classes, g);
        return g ? pass<false, true>(x, live, own, margin, a_.classes, g)
                 : pass<false, false>(x, live, own, margin, a_.classes, g);
    }
};

// Returns -1, or the first position of the target whose label is out of range.
template <class T>
int64_t margins_of(const MarginArgs& a) {
    const int64_t per_block = std::max<int64_t>(1, 2048 / std::max<int64_t>(a.classes, 1));
    const int64_t blocks = (a.rows + per_block - 1) / per_block;
    std::vector<double> sums(static_cast<size_t>(blocks));
    FirstWrong outside;
    advise_huge_pages(a.grad.data, a.rows * a.classes * size_of(a.grad.dtype));
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, per_block * a.classes));
    parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
        MarginRows<T> loss_of(a);
        std::vector<double> losses(static_cast<size_t>(per_block));
        for (int64_t b = begin; b < end; ++b) {
            const int64_t first = b * per_block, count = std::min(per_block, a.rows - first);
            for (int64_t i = 0; i < count; ++i) {
                const double loss = loss_of(first + i, outside);
                if (a.loss.data) store_one(a.loss.data, a.loss.dtype, first + i, loss);
                losses[size_t(i)] = loss;
            }
            sums[size_t(b)] = ordered_sum(losses.data(), count);
        }
    });
    if (outside.position() >= 0) return outside.position();
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / a.denominator);
    return fine;
}

}  // namespace fusedloss
