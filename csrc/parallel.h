// Threads from torch's own pool, sums in a fixed order, and memory advice.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

// For loops that must become vectors: inlining would drop their `restrict`.
#define FUSEDLOSS_LOOP __attribute__((noinline))

namespace fusedloss {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context);

// libtorch's torch_parallel_for, or null: then everything runs on the calling thread.
inline ParallelFor parallel_for = nullptr;

// How a thread rounds, and whether it flushes subnormal numbers: each thread has a state of its own, and
// those of a pool know nothing of what torch.set_flush_denormal set for the caller.
class FloatState {
public:
    FloatState() : word_(read()) {}

    // Makes it that of this thread, until the end of a scope.
    class Scope {
    public:
        explicit Scope(const FloatState& state) : before_(read()), changed_(before_ != state.word_) {
            if (changed_) write(state.word_);
        }
        ~Scope() {
            if (changed_) write(before_);
        }
        Scope(const Scope&) = delete;
        Scope& operator=(const Scope&) = delete;

    private:
        uint64_t before_;
        bool changed_;
    };

private:
    uint64_t word_;

#if defined(__SSE2__)
    static constexpr uint32_t flags = 0x3f;  // what has happened, no setting
    static uint64_t read() { return _mm_getcsr() & ~flags; }
    static void write(uint64_t word) { _mm_setcsr(uint32_t(word) | (_mm_getcsr() & flags)); }
#elif defined(__aarch64__)
    static uint64_t read() {
        uint64_t word;
        __asm__ volatile("mrs %0, fpcr" : "=r"(word));
        return word;
    }
    static void write(uint64_t word) { __asm__ volatile("msr fpcr, %0" : : "r"(word)); }
#else
    static uint64_t read() { return 0; }
    static void write(uint64_t) {}
#endif
};

// The first of the positions that threads found wrong.
class FirstWrong {
public:
    void note(int64_t position) {
        int64_t seen = first_.load();
        while (position < seen && !first_.compare_exchange_weak(seen, position)) {
        }
    }

    // Or -1.
    int64_t position() const {
        const int64_t first = first_.load();
        return first == none ? -1 : first;
    }

private:
    static constexpr int64_t none = std::numeric_limits<int64_t>::max();
    std::atomic<int64_t> first_{none};
};

// f(begin, end) over stretches of [0, n), each of at least `grain`, in the caller's floating-point state.
template <class F>
void parallel_ranges(int64_t n, int64_t grain, F&& f) {
    if (n <= 0) return;
    if (!parallel_for || n <= grain) return f(0, n);
    const FloatState callers;
    auto in_state = [&](int64_t begin, int64_t end) {
        const FloatState::Scope scope(callers);
        f(begin, end);
    };
    const auto range = [](int64_t begin, int64_t end, void* context) {
        (*static_cast<decltype(in_state)*>(context))(begin, end);
    };
    if (parallel_for(0, n, grain, range, &in_state) != 0) f(0, n);
}

// f(i) for 0 <= i < n, at least `grain` of them a thread.
template <class F>
void parallel(int64_t n, int64_t grain, F&& f) {
    parallel_ranges(n, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) f(i);
    });
}

// f(v[j], v[j + step]) for all j < step, step after step, each known to the compiler: in registers.
template <size_t lanes, class T, class F>
inline T fold(const T* v, F f) {
    T half[lanes / 2];
    for (size_t j = 0; j < lanes / 2; ++j) half[j] = f(v[j], v[j + lanes / 2]);
    if constexpr (lanes == 2)
        return half[0];
    else
        return fold<lanes / 2>(half, f);
}

template <size_t lanes>
inline double tree_sum(const double (&sums)[lanes]) {
    return fold<lanes>(sums, [](double a, double b) { return a + b; });
}

// Lane j sums the terms j, j + lanes, ..., and a tree sums the lanes: the order depends on n alone.
template <class T>
FUSEDLOSS_LOOP double ordered_sum(const T* __restrict v, int64_t n) {
    constexpr int lanes = std::is_same_v<T, double> ? 32 : 16;  // shorter sums where T is no narrower
    double sums[lanes] = {};
    const int64_t whole = n - n % lanes;
    for (int64_t i = 0; i < whole; i += lanes)
        for (int j = 0; j < lanes; ++j) sums[j] += double(v[i + j]);
    for (int64_t i = whole; i < n; ++i) sums[i - whole] += double(v[i]);
    return tree_sum(sums);
}

// Adds a group of terms of one sign to their lanes, four of them in T before they are widened: twice as fast.
template <class T, int lanes>
inline void add_group(const T* __restrict u, double (&sums)[lanes]) {
    for (int j = 0; j < lanes; ++j)
        sums[j] += double((u[j] + u[j + lanes]) + (u[j + 2 * lanes] + u[j + 3 * lanes]));
}

// As ordered_sum, by such groups.
template <class T>
FUSEDLOSS_LOOP double quick_sum(const T* __restrict v, int64_t n) {
    constexpr int lanes = 16, group = 4 * lanes;
    double sums[lanes] = {};
    const int64_t whole = n - n % group;
    for (int64_t i = 0; i < whole; i += group) add_group(v + i, sums);
    if (whole < n) {
        T rest[group] = {};
        std::copy_n(v + whole, n - whole, rest);
        add_group(rest, sums);
    }
    return tree_sum(sums);
}

// The sum of the blocks' sums. What each addition loses is kept beside it (Knuth's two-sum).
inline double total_sum(const std::vector<double>& sums) {
    double total = 0, lost = 0;
    for (const double term : sums) {
        const double sum = total + term, added = sum - total;
        lost += (total - (sum - added)) + (term - added);
        total = sum;
    }
    return lost == lost ? total + lost : total;  // NaN where the sum is infinite
}

// A fresh tensor of this size costs more in page faults than in arithmetic; 2 MiB pages divide them by 512.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t(2) << 20;
    if (!data || bytes < int64_t(4 * page)) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(page - 1);
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Zeroes dense memory: one memset a thread, since a long one goes past the caches.
inline void fill_zero(void* data, int64_t bytes) {
    constexpr int64_t size = int64_t(1) << 20;
    advise_huge_pages(data, bytes);
    parallel_ranges((bytes + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
        std::memset(static_cast<char*>(data) + begin * size, 0,
                    size_t(std::min(end * size, bytes) - begin * size));
    });
}

}  // namespace fusedloss
