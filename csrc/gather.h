// Negative log likelihood: one value of each row, and a gradient that is zero but for one class.
#pragma once
#include "rows.h"

namespace fusedloss {

// Returns -1, or the position (n * d) of the first class index that is out of range.
template <class T>
int64_t nll(const RowsArgs& a) {
    Rows<T> rows(a);
    if (const int64_t bad = rows.check(); bad >= 0) return bad;
    constexpr int64_t size = 1024;
    const int64_t blocks = (rows.positions() + size - 1) / size;
    std::vector<double> sums(static_cast<size_t>(blocks));
    if (a.grad.data) fill_zero(a.grad.data, rows.positions() * a.c * size_of(a.grad.dtype));

    parallel(blocks, 8, [&](int64_t b) {
        double losses[size];
        const int64_t first = b * size, count = std::min(size, rows.positions() - first);
        int64_t n = first / a.d, d = first % a.d;
        for (int64_t i = 0; i < count; ++i, ++d) {
            if (d == a.d) ++n, d = 0;
            const int64_t y = rows.label(n, d);
            losses[i] = 0;
            if (y == a.ignore_index) continue;
            const double w = rows.class_weight(y);
            const int64_t own = a.input.row(n, d) + y * a.input.stride[1];
            if (a.input.data) losses[i] = -w * load_one(a.input.data, a.input.dtype, own);
            if (a.grad.data)
                store_one(a.grad.data, a.grad.dtype, a.grad.row(n, d) + y * a.grad.stride[1],
                          -w * rows.incoming(n, d));
        }
        if (a.loss.data)
            for (int64_t i = 0; i < count; ++i) store_one(a.loss.data, a.loss.dtype, first + i, losses[i]);
        sums[size_t(b)] = ordered_sum(losses, count);
    });
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / rows.denominator);
    return -1;
}

}  // namespace fusedloss
