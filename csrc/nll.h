// Negative log likelihood: one value of each row, and a gradient that is zero but for one class.
#pragma once
#include "labels.h"

namespace fusedloss {

constexpr int64_t most_labels = 1024;  // at a time

// f(offset, label, i) of each row's own class, i from the first of `size` positions; what is ignored is left
// out. `ahead` is told of offsets that come a little later.
template <class T, class Ahead, class F>
inline void own_classes(const Rows<T>& rows, const Grid& grid, int64_t first, int64_t size, Ahead ahead,
                        F f) {
    int64_t y[most_labels];
    const int64_t ignored = rows.a.ignore_index, along = grid.stride[2], across = grid.stride[1];
    rows.runs(first, size, [&](int64_t at, int64_t n, int64_t d0, int64_t count) {
        rows.labels(n, d0, count, y);
        const int64_t start = row_start(grid, n, d0);
        for (int64_t i = 0; i < count; ++i) {
            if (const int64_t next = i + 16; next < count && y[next] != ignored)
                ahead(start + next * along + y[next] * across);
            if (y[i] != ignored) f(start + i * along + y[i] * across, y[i], at - first + i);
        }
    });
}

// S is the type of the input.
template <class S, class T>
void nll_losses(const Rows<T>& rows) {
    const RowsArgs& a = rows.a;
    const S* x = static_cast<const S*>(a.input.data);
    const int64_t blocks = (rows.positions() + most_labels - 1) / most_labels;
    std::vector<double> sums(static_cast<size_t>(blocks));
    parallel(blocks, 2, [&](int64_t b) {
        double losses[most_labels];
        const int64_t first = b * most_labels, total = std::min(most_labels, rows.positions() - first);
        std::fill_n(losses, total, 0.0);
        const auto fetch = [&](int64_t offset) { __builtin_prefetch(x + offset); };
        own_classes(rows, a.input, first, most_labels, fetch, [&](int64_t offset, int64_t y, int64_t i) {
            losses[i] = -rows.class_weight(y) * convert<S, double>(x[offset]);
        });
        if (a.loss.data)
            for (int64_t i = 0; i < total; ++i) store_one(a.loss.data, a.loss.dtype, first + i, losses[i]);
        sums[size_t(b)] = ordered_sum(losses, total);
    });
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / rows.denominator);
}

template <class S, class T>
void nll_gradient(const Rows<T>& rows) {
    const RowsArgs& a = rows.a;
    S* grad = static_cast<S*>(a.grad.data);
    const int64_t row_bytes = a.c * int64_t(sizeof(S));
    // Rows that lie one behind the other get their zeros just before, while these stay in the caches.
    const bool dense =
        a.grad.stride[1] == 1 && a.grad.stride[2] == a.c && (a.n == 1 || a.grad.stride[0] == a.d * a.c);
    const int64_t fit = (int64_t(1) << 16) / std::max<int64_t>(row_bytes, 1);
    const int64_t size = dense ? std::clamp<int64_t>(fit, 1, most_labels) : most_labels;
    if (dense)
        advise_huge_pages(a.grad.data, rows.positions() * row_bytes);
    else
        fill_zero(a.grad.data, rows.positions() * row_bytes);
    // Of a reduced loss, one gradient arrives for all rows.
    const bool each = a.incoming.data && (a.incoming.stride[0] != 0 || a.incoming.stride[2] != 0);
    const double all = each ? 0.0 : rows.incoming(0, 0);

    parallel((rows.positions() + size - 1) / size, dense ? 1 : 8, [&](int64_t b) {
        const int64_t first = b * size, total = std::min(size, rows.positions() - first);
        if (dense) std::memset(grad + first * a.c, 0, size_t(total * row_bytes));
        const auto fetch = [&](int64_t offset) {
            if (!dense) __builtin_prefetch(grad + offset, 1);
        };
        own_classes(rows, a.grad, first, size, fetch, [&](int64_t offset, int64_t y, int64_t i) {
            const double g = each ? rows.incoming((first + i) / a.d, (first + i) % a.d) : all;
            grad[offset] = convert<double, S>(-rows.class_weight(y) * g);
        });
    });
}

// Returns -1, or the position (n * d) of the first class index that is out of range.
inline int64_t nll(RowsArgs a) {
    lay_along_d(a);
    int64_t bad = fine;
    with_float(a.input.dtype, [&](auto tag) {  // the gradient is of this type, too
        using S = decltype(tag);
        Rows<std::conditional_t<sizeof(S) == 8, double, float>> rows(a);
        bad = rows.check();
        if (bad < 0 && (a.loss.data || a.total.data)) nll_losses<S>(rows);
        if (bad < 0 && a.grad.data) nll_gradient<S>(rows);
    });
    return bad;
}

}  // namespace fusedloss
