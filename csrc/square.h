// Transposes squares in registers, whose rows take `bytes`: a power of two.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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
        const Row upper = pick<(j & half ? side + j - half : j)...>(a, b);
        b = pick<(j & half ? side + j : j + half)...>(a, b);
        a = upper;
    }

    template <Lane... at>
    static Row pick(Row a, Row b) {
#if defined(__clang__)
        return __builtin_shufflevector(a, b, at...);
#else
        return __builtin_shuffle(a, b, Lanes{at...});
#endif
    }
};

}  // namespace fusedloss
