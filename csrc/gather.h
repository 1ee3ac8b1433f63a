// Negative log likelihood: one value of each row, and a gradient that is zero but for one class.
#pragma once
#include "rows.h"

namespace fusedloss {

// Returns -1, or the position (n * d) of the first class index that is out of range.
template <class T>
int64_t nll(RowsArgs a) {
    a.lay_along_d();
    Rows<T> rows(a);
    if (const int64_t bad = rows.check(); bad >= 0) return bad;
    constexpr int64_t size = 1024;
    const int64_t blocks = (rows.positions() + size - 1) / size;
    std::vector<double> sums(static_cast<size_t>(blocks));
    if (a.grad.data) fill_zero(a.grad.data, rows.positions() * a.c * size_of(a.grad.dtype));

    parallel(blocks, 8, [&](int64_t b) {
        int64_t y[size];
        double losses[size];
        const int64_t first = b * size, total = std::min(size, rows.positions() - first);
        rows.runs(first, size, [&](int64_t at, int64_t n, int64_t d0, int64_t count) {
            rows.labels(n, d0, count, y);
            const auto own = [&](const Grid& grid, int64_t i) {
                return grid.row(n, d0 + i) + y[i] * grid.stride[1];
            };
            for (int64_t i = 0; i < count; ++i) {
                if (const int64_t next = i + 16; next < count && y[next] != a.ignore_index) {
                    if (a.input.data) __builtin_prefetch(a.input.at(own(a.input, next)));
                    if (a.grad.data) __builtin_prefetch(a.grad.at(own(a.grad, next)), 1);
                }
                double& loss = losses[at - first + i];
                loss = 0;
                if (y[i] == a.ignore_index) continue;
                const double w = rows.class_weight(y[i]);
                if (a.input.data) loss = -w * load_one(a.input.data, a.input.dtype, own(a.input, i));
                if (a.grad.data)
                    store_one(a.grad.data, a.grad.dtype, own(a.grad, i), -w * rows.incoming(n, d0 + i));
            }
        });
        if (a.loss.data)
            for (int64_t i = 0; i < total; ++i) store_one(a.loss.data, a.loss.dtype, first + i, losses[i]);
        sums[size_t(b)] = ordered_sum(losses, total);
    });
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / rows.denominator);
    return -1;
}

}  // namespace fusedloss
