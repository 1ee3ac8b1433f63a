// Negative log likelihood: one value of each row, and a gradient that is zero but for one class.
#pragma once
#include "rows.h"

namespace fusedloss {

constexpr int64_t most_labels = 1024;  // at a time

template <class T>
void nll_losses(const Rows<T>& rows) {
    const RowsArgs& a = rows.a;
    const int64_t blocks = (rows.positions() + most_labels - 1) / most_labels;
    std::vector<double> sums(static_cast<size_t>(blocks));
    parallel(blocks, 8, [&](int64_t b) {
        int64_t y[most_labels];
        double losses[most_labels];
        const int64_t first = b * most_labels, total = std::min(most_labels, rows.positions() - first);
        rows.runs(first, most_labels, [&](int64_t at, int64_t n, int64_t d0, int64_t count) {
            rows.labels(n, d0, count, y);
            const auto own = [&](int64_t i) { return a.input.row(n, d0 + i) + y[i] * a.input.stride[1]; };
            for (int64_t i = 0; i < count; ++i) {
                if (const int64_t next = i + 16; next < count && y[next] != a.ignore_index)
                    __builtin_prefetch(a.input.at(own(next)));
                losses[at - first + i] =
                    y[i] == a.ignore_index
                        ? 0
                        : -rows.class_weight(y[i]) * load_one(a.input.data, a.input.dtype, own(i));
            }
        });
        if (a.loss.data)
            for (int64_t i = 0; i < total; ++i) store_one(a.loss.data, a.loss.dtype, first + i, losses[i]);
        sums[size_t(b)] = ordered_sum(losses, total);
    });
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / rows.denominator);
}

template <class T>
void nll_gradient(const Rows<T>& rows) {
    const RowsArgs& a = rows.a;
    const int64_t row_bytes = a.c * size_of(a.grad.dtype);
    // Rows that lie one behind the other get their zeros while these stay in the second-level cache.
    const bool dense =
        a.grad.stride[1] == 1 && a.grad.stride[2] == a.c && (a.n == 1 || a.grad.stride[0] == a.d * a.c);
    const int64_t fit = (int64_t(1) << 18) / std::max<int64_t>(row_bytes, 1);
    const int64_t size = dense ? std::clamp<int64_t>(fit, 1, most_labels) : most_labels;
    if (dense)
        advise_huge_pages(a.grad.data, rows.positions() * row_bytes);
    else
        fill_zero(a.grad.data, rows.positions() * row_bytes);

    parallel((rows.positions() + size - 1) / size, dense ? 1 : 8, [&](int64_t b) {
        int64_t y[most_labels];
        const int64_t first = b * size, total = std::min(size, rows.positions() - first);
        if (dense) std::memset(a.grad.at(first * a.c), 0, size_t(total * row_bytes));
        rows.runs(first, size, [&](int64_t, int64_t n, int64_t d0, int64_t count) {
            rows.labels(n, d0, count, y);
            const auto own = [&](int64_t i) { return a.grad.row(n, d0 + i) + y[i] * a.grad.stride[1]; };
            for (int64_t i = 0; i < count; ++i) {
                if (const int64_t next = i + 16; !dense && next < count && y[next] != a.ignore_index)
                    __builtin_prefetch(a.grad.at(own(next)), 1);
                if (y[i] == a.ignore_index) continue;
                store_one(a.grad.data, a.grad.dtype, own(i),
                          -rows.class_weight(y[i]) * rows.incoming(n, d0 + i));
            }
        });
    });
}

// Returns -1, or the position (n * d) of the first class index that is out of range.
template <class T>
int64_t nll(RowsArgs a) {
    a.lay_along_d();
    Rows<T> rows(a);
    if (const int64_t bad = rows.check(); bad >= 0) return bad;
    if (a.loss.data || a.total.data) nll_losses(rows);
    if (a.grad.data) nll_gradient(rows);
    return -1;
}

}  // namespace fusedloss
