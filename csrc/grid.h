// Tensors of rows: (n, c, d), and rows of logits.
#pragma once
#include <utility>

#include "convert.h"

namespace fusedloss {

// Where row (n, d) begins, in elements.
inline int64_t row_start(const Grid& grid, int64_t n, int64_t d) {
    return n * grid.stride[0] + d * grid.stride[2];
}

inline void* memory(const Grid& grid, int64_t offset) { return at(grid.data, grid.dtype, offset); }

inline int64_t offset_of(const Logits& x, int64_t n, int64_t c) { return n * x.stride + c; }

inline void* memory(const Logits& x, int64_t n, int64_t c) { return at(x.data, x.dtype, offset_of(x, n, c)); }

// (N, C, 1) is (1, C, N): positions lie along d, for their stretches to be long.
inline void lay_along_d(RowsArgs& a) {
    if (a.d != 1) return;
    for (Grid* grid : {&a.input, &a.target, &a.incoming, &a.loss, &a.grad, &a.grad_target})
        grid->stride[2] = grid->stride[0];
    std::swap(a.n, a.d);
}

}  // namespace fusedloss
