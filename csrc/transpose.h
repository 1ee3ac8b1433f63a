// Transposes squares in registers, whose rows take `bytes`: a power of two.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "parallel.h"

namespace fusedloss {

template <class T, int bytes>
class Square {
public:
    static constexpr int side = bytes / sizeof(T);

    static void transpose(const T* from, int64_t from_width, T* to, int64_t to_width) {
        Row rows[side];
        for (int i = 0; i < side; ++i) std::memcpy(&rows[i], from + i * from_width, sizeof(Row));
        exchange<side / 2>(rows);
        for (int i = 0; i < side; ++i) std::memcpy(to + i * to_width, &rows[i], sizeof(Row));
    }

private:
    using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef T Row __attribute__((vector_size(bytes)));
    typedef Lane Lanes __attribute__((vector_size(bytes)));

    // Squares of `half` a side trade places across the diagonal, then those of half as much within each.
    template <int half>
    static void exchange(Row (&rows)[side]) {
        for (int i = 0; i < side; ++i)
            if (!(i & half)) trade<half>(rows[i], rows[i + half], std::make_integer_sequence<Lane, side>());
        if constexpr (half > 1) exchange<half / 2>(rows);
    }

    template <int half, Lane... j>
    static void trade(Row& a, Row& b, std::integer_sequence<Lane, j...>) {
        Row upper;
        pick<(j & half ? side + j - half : j)...>(a, b, upper);
        pick<(j & half ? side + j : j + half)...>(a, b, b);
        a = upper;
    }

    template <Lane... at>
    static void pick(const Row& a, const Row& b, Row& to) {
#if defined(__clang__)
        to = __builtin_shufflevector(a, b, at...);
#else
        to = __builtin_shuffle(a, b, Lanes{at...});
#endif
    }
};

template <class T, int bytes>
inline void transpose_by(const T* __restrict from, int64_t from_width, int64_t rows, int64_t columns,
                         T* __restrict to, int64_t to_width) {
    using Block = Square<T, bytes>;
    // The last squares overlap those before.
    for (int64_t i = 0; i < rows; i += Block::side)
        for (int64_t c = 0; c < columns; c += Block::side) {
            const int64_t row = std::min(i, rows - Block::side), column = std::min(c, columns - Block::side);
            Block::transpose(from + row * from_width + column, from_width, to + column * to_width + row,
                             to_width);
        }
}

// to[c][i] = from[i][c]
template <class T>
FUSEDLOSS_LOOP void transpose(const T* __restrict from, int64_t from_width, int64_t rows, int64_t columns,
                              T* __restrict to, int64_t to_width) {
    const int64_t narrow = std::min(rows, columns) * int64_t(sizeof(T));
    if (narrow >= 32) return transpose_by<T, 32>(from, from_width, rows, columns, to, to_width);
    if (narrow >= 16) return transpose_by<T, 16>(from, from_width, rows, columns, to, to_width);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; ++c) to[c * to_width + i] = from[i * from_width + c];
}

}  // namespace fusedloss
