// Cross entropy of rows of logits in all its forms, the loss and the gradients in one go.
//
// With w the class weights (or 1), h the smoothing, q the target's probabilities (an index y is one-hot),
//   b_c = w_c ((1 - h) q_c + h / C),   loss = sum_c b_c (lse(x) - x_c),   d loss / d x_c = B p_c - b_c,
// where B = sum_c b_c and p = softmax(x). The focal loss multiplies each b_c: see focal.h. Each exp is taken
// once: it waits in the gradient's own memory until the row's sum is known; it and the sums are
// `math::raised` meanwhile.
#pragma once
#include <memory>

#include "cross_entropy_rows.h"
#include "cross_entropy_tiles.h"

namespace fusedloss {

template <class T>
constexpr int64_t short_row = 448 / sizeof(T);  // as many classes or fewer go by TileKernel
template <class T>
constexpr int64_t large_tile = (int64_t(4) << 20) / (16 * sizeof(T));  // classes: beyond the caches

// Returns -1, or the position (n * d) of the first class index that is out of range.
template <class T>
int64_t cross_entropy(RowsArgs a) {
    lay_along_d(a);
    Rows<T> rows(a);
    if (!a.probabilities) {
        if (const int64_t bad = rows.check(); bad >= 0) return bad;
    } else {
        rows.divide(double(rows.positions()));
    }
    if (a.grad.data) advise_huge_pages(a.grad.data, rows.positions() * a.c * size_of(a.grad.dtype));

    // A tile has sixteen positions at least: where there are fewer, of very many classes, rows take less
    // memory.
    const bool wasteful = a.d < 16 && a.c > large_tile<T>;
    const bool focal_parts = a.gamma != 0 && rows.soft != T(0);  // tiles alone know these
    const bool tiles = focal_parts || (!wasteful && (a.input.stride[1] != 1 || a.c <= short_row<T>));
    const int64_t lanes = TileKernel<T>::lanes(a.c, a.d, a.input.stride[1] != 1);
    const int64_t per_block = tiles ? lanes : std::max<int64_t>(1, 4 * row_block / std::max<int64_t>(a.c, 1));
    const int64_t across = tiles ? a.d : rows.positions();
    const int64_t blocks_across = (across + per_block - 1) / per_block;
    const int64_t blocks = blocks_across * (tiles ? a.n : 1);
    std::vector<double> sums(static_cast<size_t>(blocks));
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, per_block * a.c));

    // One kernel object, with its scratch, for each stretch of blocks that a thread takes.
    parallel_ranges(blocks, grain, [&](int64_t begin, int64_t end) {
        std::vector<double> losses(static_cast<size_t>(per_block));
        const auto finish = [&](int64_t b, int64_t first, int64_t count) {
            if (a.loss.data)
                for (int64_t i = 0; i < count; ++i)
                    store_one(a.loss.data, a.loss.dtype, first + i, losses[size_t(i)]);
            sums[size_t(b)] = ordered_sum(losses.data(), count);
        };
        if (tiles) {
            const auto kernel = std::make_unique<TileKernel<T>>(rows, lanes);
            for (int64_t b = begin; b < end; ++b) {
                const int64_t n = b / blocks_across, d = b % blocks_across * per_block;
                const int64_t count = std::min(per_block, a.d - d);
                (*kernel)(n, d, count, losses.data());
                finish(b, n * a.d + d, count);
            }
        } else {
            const auto kernel = std::make_unique<RowKernel<T>>(rows);
            for (int64_t b = begin; b < end; ++b) {
                const int64_t first = b * per_block, count = std::min(per_block, across - first);
                for (int64_t i = 0; i < count; ++i)
                    losses[size_t(i)] = (*kernel)((first + i) / a.d, (first + i) % a.d);
                finish(b, first, count);
            }
        }
    });
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / rows.denominator);
    return -1;
}

}  // namespace fusedloss
