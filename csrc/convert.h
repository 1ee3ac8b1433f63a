// Element types, and their conversion to and from the type that a kernel computes in.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Printed by engines/abi.py.
#include "args.h"
#include "intrinsics.h"

namespace fusedloss {

inline int64_t size_of(int64_t dtype) {
    switch (dtype) {
        case F64:
        case I64:
        case U64: return 8;
        case F32:
        case I32:
        case U32: return 4;
        case I8:
        case U8: return 1;
        default: return 2;
    }
}

struct bf16 {
    uint16_t bits;
    operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
    bf16() = default;
    // Round to nearest, ties to even; the rounding must not carry a NaN into infinity.
    explicit bf16(float v) {
        const uint32_t u = std::bit_cast<uint32_t>(v);
        const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        bits = uint16_t(v == v ? rounded : ((u >> 16) | 0x40u));
    }
};

struct f16 {
    uint16_t bits;
    f16() = default;
    // No float on the way is subnormal: where those are flushed, the value would be lost. A subnormal half is
    // the fraction of a float from 2^-14 on, less 2^-14.
    operator float() const {
        constexpr uint32_t least = 113u << 23;  // 2^-14
        const uint32_t magnitude = uint32_t(bits & 0x7fffu) << 13;
        const float tiny = std::bit_cast<float>(magnitude + least) - std::bit_cast<float>(least);
        const uint32_t normal = magnitude + (magnitude >= (0x7c00u << 13) ? 224u << 23 : 112u << 23);
        const uint32_t finite = magnitude < (0x400u << 13) ? std::bit_cast<uint32_t>(tiny) : normal;
        return std::bit_cast<float>(finite | (uint32_t(bits & 0x8000u) << 16));
    }
    // Adding 0.5 lets the adder round a value that becomes subnormal.
    explicit f16(float v) {
        const uint32_t u = std::bit_cast<uint32_t>(v);
        const uint32_t magnitude = u & 0x7fffffffu;
        const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
        const uint32_t finite = magnitude < (113u << 23) ? tiny : normal;
        const uint32_t limited = magnitude >= 0x477ff000u ? 0x7c00u : finite;
        bits = uint16_t((magnitude > 0x7f800000u ? 0x7e00u : limited) | ((u >> 16) & 0x8000u));
    }
};

template <class From, class To>
inline To convert(From v) {
    if constexpr (std::is_same_v<To, bf16> || std::is_same_v<To, f16>)
        return To(float(v));
    else if constexpr (std::is_same_v<From, bf16> || std::is_same_v<From, f16>)
        return To(float(v));
    else
        return To(v);
}

// Whether there are instructions for this: to them a subnormal number, as the gradients of many elements are,
// costs nothing, where arithmetic takes a hundred cycles for it.
#if defined(__F16C__)
template <class From, class To>
constexpr bool by_eights = (std::is_same_v<From, f16> && std::is_same_v<To, float>) ||
                           (std::is_same_v<From, float> && std::is_same_v<To, f16>);

inline void convert_eight(const f16* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline void convert_eight(const float* from, f16* to) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
#else
template <class From, class To>
constexpr bool by_eights = false;
#endif

#if defined(__AVX512F__)
inline const bool rounds_to_bf16 = __builtin_cpu_supports("avx512bf16");

// What bf16(float) gives, in half of the time. The instruction takes subnormal numbers for 0: a group that
// has some goes the long way. Returns how many elements are done.
__attribute__((target("avx512bf16"))) inline int64_t round_to_bf16(const float* __restrict from,
                                                                   bf16* __restrict to, int64_t n) {
    constexpr int subnormal = 0x20;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + 16);
        const __mmask16 long_way =
            _mm512_fpclass_ps_mask(low, subnormal) | _mm512_fpclass_ps_mask(high, subnormal);
        if (__builtin_expect(long_way != 0, 0)) {
            for (int64_t j = i; j < i + 32; ++j) to[j] = bf16(from[j]);
        } else {
            const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
            std::memcpy(to + i, &both, sizeof both);
        }
    }
    return i;
}
#endif

template <class From, class To>
inline void convert_all(const From* __restrict from, To* __restrict to, int64_t n) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<From, float> && std::is_same_v<To, bf16>) {
        if (rounds_to_bf16) {
            const int64_t done = round_to_bf16(from, to, n);
            from += done, to += done, n -= done;
        }
    }
#endif
    if constexpr (by_eights<From, To>) {
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) convert_eight(from + i, to + i);
        if (i == n) return;
        From last[8] = {};
        To converted[8];
        std::copy_n(from + i, n - i, last);
        convert_eight(last, converted);
        std::copy_n(converted, n - i, to + i);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = convert<From, To>(from[i]);
    }
}

template <class T>
constexpr int64_t dtype_of = std::is_same_v<T, float> ? int64_t(F32) : int64_t(F64);

// Calls f with a value of the element type that a floating dtype stands for.
template <class F>
inline void with_float(int64_t dtype, F&& f) {
    switch (dtype) {
        case F32: return f(float{});
        case F64: return f(double{});
        case BF16: return f(bf16{});
        default: return f(f16{});
    }
}

// n elements, `stride` apart (in elements), as T in `buffer`. Not inlined: each of its loops stands once.
template <class T>
__attribute__((noinline)) void load_strided(const void* data, int64_t dtype, int64_t stride, int64_t n,
                                            T* __restrict buffer) {
    with_float(dtype, [&](auto tag) {
        using S = decltype(tag);
        const S* __restrict from = static_cast<const S*>(data);
        if (stride == 1) {
            convert_all(from, buffer, n);
        } else if (stride == 0 && n > 0) {  // without elements there may be no memory
            const T v = convert<S, T>(from[0]);
            for (int64_t i = 0; i < n; ++i) buffer[i] = v;
        } else {
            for (int64_t i = 0; i < n; ++i) buffer[i] = convert<S, T>(from[i * stride]);
        }
    });
}

// A pointer to n elements as T: the tensor's own memory where it serves, `buffer` where not.
template <class T>
inline const T* load(const void* data, int64_t dtype, int64_t stride, int64_t n, T* buffer) {
    if (stride == 1 && dtype == dtype_of<T>) return static_cast<const T*>(data);
    load_strided(data, dtype, stride, n, buffer);
    return buffer;
}

// Not inlined: GCC then keeps the conversions in vectors.
template <class T>
__attribute__((noinline)) void store(void* data, int64_t dtype, int64_t stride, int64_t n,
                                     const T* __restrict buffer) {
    with_float(dtype, [&](auto tag) {
        using S = decltype(tag);
        S* __restrict to = static_cast<S*>(data);
        if (stride == 1) {
            convert_all(buffer, to, n);
        } else {
            for (int64_t i = 0; i < n; ++i) to[i * stride] = convert<T, S>(buffer[i]);
        }
    });
}

// Calls f with a value of the half type that a dtype stands for, if it is one.
template <class F>
inline bool with_half(int64_t dtype, F&& f) {
    if (dtype == BF16) return f(bf16{}), true;
    if (dtype == F16) return f(f16{}), true;
    return false;
}

// Dense elements to or from a buffer, where as many follow: these are asked for meanwhile, since loops over
// buffers ask for none. A cache line at a time of the half types.
template <class From, class To>
__attribute__((noinline)) void convert_and_ask(const From* __restrict from, To* __restrict to, int64_t n) {
    constexpr int64_t line = 64 / std::min(sizeof(From), sizeof(To));
    int64_t i = 0;
    for (; i + line <= n; i += line) {
        if constexpr (sizeof(From) < sizeof(To))
            __builtin_prefetch(from + i + n);
        else
            __builtin_prefetch(to + i + n, 1);
        convert_all(from + i, to + i, line);
    }
    convert_all(from + i, to + i, n - i);
}

// Each stands once, in convert.cpp.
extern template void load_strided(const void*, int64_t, int64_t, int64_t, float* __restrict);
extern template void load_strided(const void*, int64_t, int64_t, int64_t, double* __restrict);
extern template void store(void*, int64_t, int64_t, int64_t, const float* __restrict);
extern template void store(void*, int64_t, int64_t, int64_t, const double* __restrict);

inline void store_one(void* data, int64_t dtype, int64_t index, double v) {
    with_float(dtype, [&](auto tag) {
        using S = decltype(tag);
        static_cast<S*>(data)[index] = convert<double, S>(v);
    });
}

inline double load_one(const void* data, int64_t dtype, int64_t index) {
    double v = 0;
    with_float(dtype, [&](auto tag) {
        using S = decltype(tag);
        v = convert<S, double>(static_cast<const S*>(data)[index]);
    });
    return v;
}

// Calls f with a value of the type of a class index; unsigned 64-bit values beyond int64 become negative and
// so out of range.
template <class F>
inline auto with_index(int64_t dtype, F&& f) {
    switch (dtype) {
        case I64:
        case U64: return f(int64_t{});
        case I32: return f(int32_t{});
        case I16: return f(int16_t{});
        case I8: return f(int8_t{});
        case U16: return f(uint16_t{});
        case U32: return f(uint32_t{});
        default: return f(uint8_t{});
    }
}

inline int64_t load_index(const void* data, int64_t dtype, int64_t index) {
    return with_index(dtype,
                      [&](auto tag) { return int64_t(static_cast<const decltype(tag)*>(data)[index]); });
}

inline void load_indices(const void* data, int64_t dtype, int64_t start, int64_t stride, int64_t n,
                         int64_t* __restrict out) {
    with_index(dtype, [&](auto tag) {
        const auto* __restrict from = static_cast<const decltype(tag)*>(data) + start;
        if (stride == 1)
            for (int64_t i = 0; i < n; ++i) out[i] = from[i];
        else
            for (int64_t i = 0; i < n; ++i) out[i] = from[i * stride];
    });
}

inline const void* at(const void* data, int64_t dtype, int64_t offset) {
    return static_cast<const char*>(data) + offset * size_of(dtype);
}

inline void* at(void* data, int64_t dtype, int64_t offset) {
    return static_cast<char*>(data) + offset * size_of(dtype);
}

}  // namespace fusedloss
