// Cross entropy of rows of logits in all its forms, the loss and the gradients in one go.
//
// With w the class weights (or 1), h the smoothing, q the target's probabilities (an index y is one-hot),
//   b_c = w_c ((1 - h) q_c + h / C),   loss = sum_c b_c (lse(x) - x_c),   d loss / d x_c = B p_c - b_c,
// where B = sum_c b_c and p = softmax(x). Each exp is taken once: it waits in the gradient's own memory
// until the row's sum is known; it and the sums are `math::raised` meanwhile.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "convert.h"
#include "math.h"
#include "parallel.h"
#include "square.h"

namespace fusedloss {

// Where row (n, d) begins, in elements.
inline int64_t row_start(const Grid& grid, int64_t n, int64_t d) {
    return n * grid.stride[0] + d * grid.stride[2];
}

inline void* memory(const Grid& grid, int64_t offset) { return at(grid.data, grid.dtype, offset); }

// (N, C, 1) is (1, C, N): positions lie along d, for their stretches to be long.
inline void lay_along_d(RowsArgs& a) {
    if (a.d != 1) return;
    for (Grid* grid : {&a.input, &a.target, &a.incoming, &a.loss, &a.grad, &a.grad_target})
        grid->stride[2] = grid->stride[0];
    std::swap(a.n, a.d);
}

constexpr int64_t row_block = 1024;  // classes at a time
template <class T>
constexpr int64_t short_row = 448 / sizeof(T);  // as many classes or fewer go by TileKernel
template <class T>
constexpr int64_t large_tile = (int64_t(4) << 20) / (16 * sizeof(T));  // classes: beyond the caches

inline bool is_wrong(int64_t y, int64_t ignore_index, int64_t classes) {
    return y != ignore_index && (y < 0 || y >= classes);
}

// How many of the labels count; whether one of them is out of range.
FUSEDLOSS_LOOP inline int64_t counted(const int64_t* __restrict y, int64_t n, int64_t ignore_index,
                                      int64_t classes, bool& outside) {
    int64_t count = 0, bad = 0;
#pragma omp simd reduction(+ : count) reduction(| : bad)
    for (int64_t i = 0; i < n; ++i) {
        count += y[i] != ignore_index;
        bad |= is_wrong(y[i], ignore_index, classes);
    }
    outside = bad != 0;
    return count;
}

template <class T>
struct Rows {
    const RowsArgs& a;
    const T* weight;
    double weight_sum;   // over classes
    double denominator;  // of the mean
    T hard, soft;        // 1 - smoothing, smoothing / C

    explicit Rows(const RowsArgs& args) : a(args), weight(static_cast<const T*>(args.weight.data)) {
        weight_sum = weight ? ordered_sum(weight, a.c) : double(a.c);
        hard = T(1 - a.smoothing);
        soft = a.smoothing > 0 ? T(a.smoothing / double(a.c)) : T(0);
        denominator = 1;
    }

    int64_t positions() const { return a.n * a.d; }
    int64_t label(int64_t n, int64_t d) const {
        return load_index(a.target.data, a.target.dtype, row_start(a.target, n, d));
    }
    void labels(int64_t n, int64_t d, int64_t count, int64_t* y) const {
        load_indices(a.target.data, a.target.dtype, row_start(a.target, n, d), a.target.stride[2], count, y);
    }
    // f(i, n, d, count) for the stretches of one n that positions [first, first + size) fall into.
    template <class F>
    void runs(int64_t first, int64_t size, F&& f) const {
        const int64_t end = std::min(first + size, positions());
        for (int64_t i = first; i < end;) {
            const int64_t d = i % a.d, count = std::min(end - i, a.d - d);
            f(i, i / a.d, d, count);
            i += count;
        }
    }

    double class_weight(int64_t y) const { return weight ? double(weight[y]) : 1.0; }

    // Returns -1, or the first position whose index is out of range; sets the mean's denominator.
    int64_t check() {
        constexpr int64_t size = 4096, strip = 1024, none = std::numeric_limits<int64_t>::max();
        const int64_t blocks = (positions() + size - 1) / size;
        std::vector<double> sums(static_cast<size_t>(blocks));
        std::atomic<int64_t> outside{none};
        parallel(blocks, 4, [&](int64_t b) {
            int64_t y[strip];
            double sum = 0;
            const auto look = [&](int64_t i, int64_t n, int64_t d, int64_t count) {
                labels(n, d, count, y);
                bool bad = false;
                const int64_t valid = counted(y, count, a.ignore_index, a.c, bad);
                if (bad) {
                    const auto wrong = [&](int64_t label) { return is_wrong(label, a.ignore_index, a.c); };
                    const int64_t at = i + (std::find_if(y, y + count, wrong) - y);
                    int64_t seen = outside.load();
                    while (at < seen && !outside.compare_exchange_weak(seen, at)) {
                    }
                    return;
                }
                if (!weight) sum += double(valid);
                for (int64_t k = 0; weight && k < count; ++k)
                    if (y[k] != a.ignore_index) sum += double(weight[y[k]]);
            };
            for (int64_t first = 0; first < size; first += strip) runs(b * size + first, strip, look);
            sums[size_t(b)] = sum;
        });
        if (outside.load() != none) return outside.load();
        if (a.mean) denominator = total_sum(sums);
        return -1;
    }

    double incoming(int64_t n, int64_t d) const {
        const double g =
            a.incoming.data ? load_one(a.incoming.data, a.incoming.dtype, row_start(a.incoming, n, d)) : 1.0;
        return a.mean ? g / denominator : g;
    }
};

template <class T>
FUSEDLOSS_LOOP T greatest(const T* __restrict x, int64_t n, T start) {
    constexpr int width = 64;  // enough that no comparison waits for the one before
    const auto larger = [](T a, T b) { return b > a ? b : a; };
    if (n < width) {
        T few[width];
        std::fill_n(few, width, start);
        for (int64_t i = 0; i < n; ++i) few[i] = larger(start, x[i]);
        return fold<width>(few, larger);
    }
    T tops[width];
    std::fill_n(tops, width, start);
    const int64_t last = n - width;
    for (int64_t i = 0; i < last; i += width)
        for (int j = 0; j < width; ++j) tops[j] = larger(tops[j], x[i + j]);
    for (int j = 0; j < width; ++j) tops[j] = larger(tops[j], x[last + j]);  // some of them again
    return fold<width>(tops, larger);
}

// The first position where e is that of the maximum, or n.
template <class T>
FUSEDLOSS_LOOP int64_t first_one(const T* __restrict e, int64_t n) {
    constexpr int64_t width = 64;
    int64_t i = 0;
    for (; i + width <= n; i += width) {
        T greatest = 0;
#pragma omp simd reduction(max : greatest)
        for (int64_t j = i; j < i + width; ++j) greatest = e[j] > greatest ? e[j] : greatest;
        if (greatest == math::raised<T>) break;
    }
    while (i < n && e[i] != math::raised<T>) ++i;
    return i;
}

// Also asks for what follows in memory, the next block or row, with elements of `width` bytes, and for where
// its exps go: these leave time for it to arrive.
template <class T>
FUSEDLOSS_LOOP void exp_of_difference(const T* __restrict x, T origin, int64_t n, T* __restrict e,
                                      const void* next, int64_t width) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t whole = n - n % line;
    const auto exp = [origin](auto v) { return math::exp_raised(v - decltype(v)(origin)); };
    for (int64_t i = 0; i < whole; i += line) {
        __builtin_prefetch(static_cast<const char*>(next) + i * width);
        __builtin_prefetch(e + i + n, 1);
        math::map(e + i, line, exp, x + i);
    }
    math::map(e + whole, n - whole, exp, x + whole);
}

// e * factor - flat
template <class T>
FUSEDLOSS_LOOP void scale_and_shift(T* __restrict e, T factor, T flat, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) e[i] = e[i] * factor - flat;
}

// Whether a factor of raised exps, `scale` of the exps themselves, is so small that T has no digits for it.
template <class T>
inline bool too_small(double scale) {
    return scale != 0 && std::fabs(scale * double(math::lowered<T>)) < double(std::numeric_limits<T>::min());
}

// What raised exps are multiplied by for `scale` times the exps; where that is too small, they are lowered.
template <class T>
inline T factor_of_raised(T* e, double scale, int64_t n) {
    if (!too_small<T>(scale)) return T(scale * double(math::lowered<T>));
    scale_and_shift(e, math::lowered<T>, T(0), n);
    return T(scale);
}

// sum * exp(gap), for a sum of raised exps that is brought to a larger maximum: beyond where exp(gap) alone
// has its digits, too.
inline double brought(double sum, double gap) {
    if (gap > -700) return sum * std::exp(gap);
    const double half = std::exp(0.5 * gap);
    return sum * half * half;
}

// e * factor - g * part
template <class T>
FUSEDLOSS_LOOP void scale_and_take(T* __restrict e, T factor, T g, const T* __restrict part, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) e[i] = e[i] * factor - g * part[i];
}

// part becomes (hard * part + soft) * w; a null w is 1.
template <class T>
FUSEDLOSS_LOOP void weigh(T* __restrict part, T hard, T soft, const T* __restrict w, int64_t n) {
    if (hard != T(1) || soft != T(0))
        for (int64_t i = 0; i < n; ++i) part[i] = hard * part[i] + soft;
    if (w)
        for (int64_t i = 0; i < n; ++i) part[i] *= w[i];
}

struct SoftSums {
    double mass, dot;
};

// The sums of part and of part * (x - origin), each of terms of one sign: see quick_sum. 0 * -inf is 0 here:
// a class without probability does not count.
template <class T>
FUSEDLOSS_LOOP SoftSums soft_sums(const T* __restrict part, const T* __restrict x, T origin, int64_t n) {
    constexpr int lanes = 16, group = 4 * lanes;
    double masses[lanes] = {}, dots[lanes] = {};
    const auto add = [&](const T* __restrict p, const T* __restrict x) {
        T terms[group];
#pragma omp simd
        for (int j = 0; j < group; ++j) {
            const T product = p[j] * (x[j] - origin);
            terms[j] = p[j] == T(0) && x[j] == x[j] ? T(0) : product;
        }
        add_group(terms, dots);
        add_group(p, masses);
    };
    const int64_t whole = n - n % group;
    for (int64_t i = 0; i < whole; i += group) {
        for (int64_t line = 0; line < group; line += lanes) __builtin_prefetch(part + i + line + n);
        add(part + i, x + i);
    }
    if (whole < n) {
        T part_rest[group] = {}, x_rest[group] = {};
        std::copy_n(part + whole, n - whole, part_rest);
        std::copy_n(x + whole, n - whole, x_rest);
        add(part_rest, x_rest);
    }
    return {tree_sum(masses), tree_sum(dots)};
}

// scale * -log p, where top + rest is the log of the sum; 0 for a masked class without probability.
template <class T>
FUSEDLOSS_LOOP void log_shares(const T* __restrict part, const T* __restrict x, T scale, T top, T rest,
                               int64_t n, T* __restrict out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const T share = scale * ((top - x[i]) + rest);
        out[i] = part[i] == T(0) && x[i] == -std::numeric_limits<T>::infinity() ? T(0) : share;
    }
}

// What the passes over a row gather, and what the last pass needs of it. The row's own class is the target's,
// or of probabilities the largest: it is kept apart from the others, so that no digits are lost near p = 1.
template <class T>
struct RowSums {
    static constexpr double lowered = math::lowered<T>;
    double max = 0;     // finite, or 0 for a row of -inf
    double others = 0;  // sum of exp(x - max) but for the own class, raised
    double own = 0;     // that of the own class, raised
    double own_x = 0;
    double dot = 0;   // sum of b_c (x_c - max) over the soft part of b
    double mass = 0;  // sum of the soft part of b

    double raised_sum() const { return others + own; }
    double sum() const { return raised_sum() * lowered; }
    bool own_is_largest() const { return own == double(math::raised<T>); }

    // Where the target class is the largest, log1p keeps the digits that 1 + others loses.
    double log_sum() const { return own_is_largest() ? std::log1p(others * lowered) : std::log(sum()); }
    double own_loss() const { return log_sum() + (own_is_largest() ? 0.0 : max - own_x); }
    double soft_loss() const { return mass * log_sum() - dot; }
};

// With what probabilities need besides: the own class, and the sum of the soft part of b of the others.
template <class T>
struct OwnSums : RowSums<T> {
    double rest = 0;
    int64_t top = -1;
};

// Contiguous (or gathered) classes: vectorised along the row.
template <class T>
class RowKernel {
public:
    explicit RowKernel(const Rows<T>& rows) : r(rows), a(rows.a) {
        const bool direct = a.grad.dtype == dtype_of<T> && a.grad.stride[1] == 1;
        if (a.grad.data && !direct) scratch.resize(size_t(a.c));
        shift.resize(size_t((a.c + block - 1) / block));
    }

    // The loss of row (n, d); writes the gradients that are asked for.
    double operator()(int64_t n, int64_t d) {
        const int64_t x_row = row_start(a.input, n, d), g_row = row_start(a.grad, n, d);
        int64_t y = -1;
        if (!a.probabilities) {
            y = r.label(n, d);
            if (y == a.ignore_index) {
                zero(g_row);
                return 0;
            }
        }
        T* e = scratch.empty() ? static_cast<T*>(a.grad.data) + (a.grad.data ? g_row : 0) : scratch.data();
        const OwnSums<T> s = gather(x_row, n, d, y, a.grad.data ? e : nullptr);
        const double own_weight = y < 0 ? 0 : double(r.hard) * r.class_weight(y);
        double loss = s.mass != 0 || a.probabilities ? s.soft_loss() : 0;
        if (y >= 0) loss += own_weight * s.own_loss();
        if (!a.grad.data && !a.grad_target.data) return loss;

        const double g = r.incoming(n, d);
        if (a.grad.data) {
            const double sum = s.raised_sum(), scale = g * (own_weight + s.mass) / s.sum();
            // p - 1 as minus the others' share: exact where p is near 1. B p - b of the largest class as
            // (B - b) - B (1 - p), for the same reason.
            const T own = y >= 0 ? T(g * ((s.mass * s.own - own_weight * s.others) / sum -
                                          double(r.soft) * r.class_weight(y)))
                                 : T(g * (s.rest - s.mass * s.others / sum));
            finish(e, n, d, scale, s, T(g), y >= 0 ? y : s.top, own);
        }
        if (a.grad_target.data) target_gradient(x_row, n, d, s, g);
        return loss;
    }

private:
    const Rows<T>& r;
    const RowsArgs& a;
    // With registers as wide as AVX-512's, the start and the end of a block's loops would weigh more. Of
    // probabilities, which are read beside the logits, less fits the first-level cache.
    static constexpr int64_t most = math::lanes<T> > 1 ? 2 * row_block : row_block;
    const int64_t block = a.probabilities ? row_block : most;
    std::vector<T> scratch, shift;
    alignas(64) T x_buffer[most], q_buffer[most], e_buffer[most];

    const T* input(int64_t x_row, int64_t c, int64_t count) {
        return load<T>(memory(a.input, x_row + c * a.input.stride[1]), a.input.dtype, a.input.stride[1],
                       count, x_buffer);
    }
    // b_c of the soft part, for classes from c on; null where it is `soft` for all.
    const T* soft_part(int64_t n, int64_t d, int64_t c, int64_t count) {
        const T* w = r.weight ? r.weight + c : nullptr;
        if (a.probabilities) {
            const void* from = memory(a.target, row_start(a.target, n, d) + c * a.target.stride[1]);
            if (!w && r.soft == T(0))
                return load<T>(from, a.target.dtype, a.target.stride[1], count, q_buffer);
            load_strided<T>(from, a.target.dtype, a.target.stride[1], count, q_buffer);
        } else if (w) {
            std::fill_n(q_buffer, count, T(0));
        } else {
            return nullptr;
        }
        weigh(q_buffer, r.hard, r.soft, w, count);
        return q_buffer;
    }

    void zero(int64_t g_row) {
        if (!a.grad.data) return;
        std::fill_n(e_buffer, std::min(a.c, block), T(0));
        for (int64_t c = 0; c < a.c; c += block)
            store(memory(a.grad, g_row + c * a.grad.stride[1]), a.grad.dtype, a.grad.stride[1],
                  std::min(block, a.c - c), e_buffer);
    }

    OwnSums<T> gather(int64_t x_row, int64_t n, int64_t d, int64_t y, T* keep) {
        OwnSums<T> s;
        T max = -std::numeric_limits<T>::infinity();
        const bool soft = a.probabilities || r.soft != T(0);
        for (int64_t c = 0, b = 0; c < a.c; c += block, ++b) {
            const int64_t count = std::min(block, a.c - c);
            const T* __restrict x = input(x_row, c, count);
            const T top = greatest(x, count, max);
            const T origin = top == -std::numeric_limits<T>::infinity() ? T(0) : top;
            const bool raised = top > max;
            if (raised && s.raised_sum() > 0) {
                s.others = brought(s.others, double(max) - double(top));
                s.own = brought(s.own, double(max) - double(top));
            }
            // What was gathered relative to the old maximum is brought to the new one.
            if (s.mass != 0) s.dot += s.mass * (s.max - double(origin));
            max = top;
            shift[size_t(b)] = origin;
            s.max = double(origin);
            T* __restrict e = keep ? keep + c : e_buffer;
            const void* next = memory(a.input, x_row + (c + count) * a.input.stride[1]);
            exp_of_difference(x, origin, count, e, next, size_of(a.input.dtype));
            if (y >= c && y < c + count) {
                s.own = double(e[y - c]);
                s.own_x = double(x[y - c]);
                e[y - c] = T(0);
            }
            const T* part = soft ? soft_part(n, d, c, count) : nullptr;
            double own_part = 0;
            if (a.probabilities && raised) {
                // The class that was the largest is one of the others now.
                if (keep && s.top >= 0) keep[s.top] = math::raised<T>;
                s.others += s.own;
                s.rest = s.mass;
                const int64_t at = first_one(e, count);  // none where max is inf
                s.own = at < count ? double(math::raised<T>) : 0;
                s.top = at < count ? c + at : -1;
                if (at < count) {
                    if (part != q_buffer) part = std::copy_n(part, count, q_buffer) - count;
                    own_part = double(q_buffer[at]);
                    e[at] = q_buffer[at] = T(0);  // its product below is 0, too
                }
            }
            s.others += quick_sum(e, count);
            if (part) {
                const SoftSums sums = soft_sums<T>(part, x, origin, count);
                s.rest += sums.mass;
                s.mass += sums.mass + own_part;
                s.dot += sums.dot;
            } else if (soft) {
                s.mass += double(r.soft) * double(count);
                s.dot += double(r.soft) * (ordered_sum(x, count) - double(count) * s.max);
            }
        }
        return s;
    }

    // e_c becomes g (B p_c - b_c), that of the own class `slope`, and goes to where the gradient is.
    void finish(T* row, int64_t n, int64_t d, double scale, const OwnSums<T>& s, T g, int64_t own, T slope) {
        const int64_t g_row = row_start(a.grad, n, d);
        const bool soft = a.probabilities || r.soft != T(0);
        for (int64_t c = 0, b = 0; c < a.c; c += block, ++b) {
            const int64_t count = std::min(block, a.c - c);
            const double origin = double(shift[size_t(b)]);
            const double relative = origin == s.max ? scale : scale * std::exp(origin - s.max);
            const T factor = factor_of_raised(row + c, relative, count);
            if (const T* part = soft ? soft_part(n, d, c, count) : nullptr)
                scale_and_take(row + c, factor, g, part, count);
            else
                scale_and_shift(row + c, factor, g * r.soft, count);
            if (own >= c && own < c + count) row[own] = slope;
            if (!scratch.empty())
                store(memory(a.grad, g_row + c * a.grad.stride[1]), a.grad.dtype, a.grad.stride[1], count,
                      row + c);
        }
    }

    void target_gradient(int64_t x_row, int64_t n, int64_t d, const OwnSums<T>& s, double g) {
        const T scale = T(g) * r.hard, top = T(s.max), rest = T(s.log_sum());
        for (int64_t c = 0; c < a.c; c += block) {
            const int64_t count = std::min(block, a.c - c);
            const T* __restrict x = input(x_row, c, count);
            const T* __restrict part = soft_part(n, d, c, count);
            log_shares(part, x, scale, top, rest, count, e_buffer);
            if (r.weight)
                for (int64_t i = 0; i < count; ++i) e_buffer[i] *= r.weight[c + i];
            const int64_t offset = row_start(a.grad_target, n, d) + c * a.grad_target.stride[1];
            store(memory(a.grad_target, offset), a.grad_target.dtype, a.grad_target.stride[1], count,
                  e_buffer);
        }
    }
};

// The loops of TileKernel: one class, `n` positions.
template <class T>
FUSEDLOSS_LOOP void raise(T* __restrict max, const T* __restrict x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) max[i] = x[i] > max[i] ? x[i] : max[i];
}

template <class T, class Index>
FUSEDLOSS_LOOP void raise(T* __restrict max, Index* __restrict largest, const T* __restrict x, Index c,
                          int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        largest[i] = x[i] > max[i] ? c : largest[i];
        max[i] = x[i] > max[i] ? x[i] : max[i];
    }
}

template <class T>
FUSEDLOSS_LOOP void exp_in_place(T* __restrict x, const T* __restrict max, int64_t n) {
    math::map(x, n, [](auto v, auto top) { return math::exp_raised(v - top); }, x, max);
}

template <class T>
FUSEDLOSS_LOOP void add(double* __restrict sums, const T* __restrict e, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += double(e[i]);
}

// Of four classes, `width` apart: see quick_sum.
template <class T>
FUSEDLOSS_LOOP void add_four(double* __restrict sums, const T* __restrict e, int64_t width, int64_t n) {
    const T* __restrict e1 = e + width, * __restrict e2 = e1 + width, * __restrict e3 = e2 + width;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += double((e[i] + e1[i]) + (e2[i] + e3[i]));
}

template <class T, class Index>
FUSEDLOSS_LOOP void add_but_largest(double* __restrict sums, const T* __restrict part,
                                    const Index* __restrict largest, Index c, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += double(largest[i] == c ? T(0) : part[i]);
}

template <class T>
FUSEDLOSS_LOOP void add_products(double* __restrict dots, const T* __restrict part, const T* __restrict x,
                                 const T* __restrict max, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const double term = double(part[i]) * (double(x[i]) - double(max[i]));
        dots[i] += part[i] == T(0) && x[i] == x[i] ? 0.0 : term;
    }
}

// What TileKernel knows of the positions of a tile. The own class is as in RowSums.
template <class T>
struct Positions {
    static constexpr int64_t most = 256, ignored = -2;
    alignas(64) int64_t y[most];
    alignas(64) T max[most], own_x[most], own[most], factor[most], lowering[most], g[most];
    alignas(64) double weight[most], others[most], dots[most], masses[most], rest[most];
    alignas(64) double log_sum[most], incoming[most];
};

// The labels to ignore become `mark`; whether there are any.
FUSEDLOSS_LOOP inline bool mark_ignored(int64_t* __restrict y, int64_t n, int64_t ignore_index,
                                        int64_t mark) {
    int64_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < n; ++i) {
        any |= y[i] == ignore_index;
        y[i] = y[i] == ignore_index ? mark : y[i];
    }
    return any != 0;
}

// tile[y_i][i]
template <class T>
FUSEDLOSS_LOOP void own_logits(Positions<T>& p, const T* __restrict tile, int64_t width, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        p.own_x[i] = p.y[i] >= 0 ? tile[p.y[i] * width + i] : -std::numeric_limits<T>::infinity();
}

// tile[y_i][i] = value(i)
template <class T, class Value>
FUSEDLOSS_LOOP void set_own(const int64_t* __restrict y, int64_t n, const Value& value, T* __restrict tile,
                            int64_t width) {
    for (int64_t i = 0; i < n; ++i)
        if (y[i] >= 0) tile[y[i] * width + i] = value(i);
}

template <class T>
FUSEDLOSS_LOOP void own_exps(Positions<T>& p, int64_t n) {
    math::map(p.own, n, [](auto v, auto top) { return math::exp_raised(v - top); }, p.own_x, p.max);
}

// log1p keeps the digits near certainty, where the own class is the largest.
template <class T, bool indices, bool soft>
FUSEDLOSS_LOOP void position_losses(Positions<T>& p, int64_t n, double hard, double* __restrict losses) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        constexpr double lowered = math::lowered<T>;
        const double log_sum = math::log1p(p.others[i] * lowered + (double(p.own[i]) * lowered - 1.0));
        p.log_sum[i] = log_sum;
        double loss = 0;
        if constexpr (indices) {
            const double behind = p.own[i] == math::raised<T> ? 0.0 : double(p.max[i]) - double(p.own_x[i]);
            loss = hard * p.weight[i] * (log_sum + behind);
        }
        if constexpr (soft) loss += p.masses[i] * log_sum - p.dots[i];
        losses[i] = p.y[i] == p.ignored ? 0.0 : loss;
    }
}

// From what arrives: the factor of the raised exps, and the own class's gradient, p - 1 as minus the others'
// share. Whether the exps must be lowered, by `lowering`, since a factor would be too small.
template <class T, bool indices, bool soft>
FUSEDLOSS_LOOP bool position_slopes(Positions<T>& p, int64_t n, double hard, double smooth) {
    constexpr double lowered = math::lowered<T>, least = std::numeric_limits<T>::min();
    int64_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = 0; i < n; ++i) {
        const double in = p.y[i] == p.ignored ? 0.0 : p.incoming[i];
        const double mass = soft ? p.masses[i] : 0.0, own_weight = indices ? hard * p.weight[i] : 0.0;
        const double others = p.others[i] * lowered, own = double(p.own[i]) * lowered;
        const double scale = in / (others + own);
        const double factor = scale * (own_weight + mass);
        const bool small = math::abs(factor * lowered) < least;
        p.g[i] = T(in);
        p.factor[i] = T(small ? factor : factor * lowered);
        p.lowering[i] = small ? math::lowered<T> : T(1);
        any |= small && factor != 0;
        p.own[i] = indices ? T(scale * (mass * own - own_weight * others) - in * smooth * p.weight[i])
                           : T(in * p.rest[i] - scale * mass * others);
    }
    return any != 0;
}

// f(i) for all i < n, vector by vector, while the line of `next` that lies as far on is asked for, to read or
// to write.
template <class T, bool to_write, class F>
inline void each_ahead(int64_t n, const T* next, F f) {
    constexpr int64_t line = 64 / sizeof(T);
    const int64_t whole = n - n % line;
    for (int64_t i = 0; i < whole; i += line) {
        __builtin_prefetch(next + i, to_write);
#pragma omp simd
        for (int64_t j = i; j < i + line; ++j) f(j);
    }
#pragma omp simd
    for (int64_t i = whole; i < n; ++i) f(i);
}

template <class T>
FUSEDLOSS_LOOP void copy_and_raise(const T* __restrict from, int64_t n, T* __restrict to, T* __restrict max,
                                   const T* next) {
    each_ahead<T, false>(n, next, [=](int64_t i) {
        to[i] = from[i];
        max[i] = from[i] > max[i] ? from[i] : max[i];
    });
}

// e * factor - g * part, or e * factor; `out` may be `e`.
template <class T>
FUSEDLOSS_LOOP void slope(const T* e, const T* factor, const T* g, const T* part, int64_t n, T* out,
                          const T* next) {
    each_ahead<T, true>(n, next, [=](int64_t i) { out[i] = e[i] * factor[i] - g[i] * part[i]; });
}

template <class T>
FUSEDLOSS_LOOP void multiply_each(const T* e, const T* factor, int64_t n, T* out, const T* next) {
    each_ahead<T, true>(n, next, [=](int64_t i) { out[i] = e[i] * factor[i]; });
}

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

// Strided classes: vectorised across positions, on a copy of the tile, since strides that are powers of two
// would have its classes evict each other from the caches. The passes are those of RowKernel.
template <class T>
class TileKernel {
public:
    TileKernel(const Rows<T>& rows, int64_t lanes)
        : r(rows),
          a(rows.a),
          width(lanes),
          soft(a.probabilities || r.soft != T(0)),
          tile(size_t(a.c * lanes)) {
        if (soft) parts.resize(tile.size());
    }

    // Positions at a time: as many as keep a tile in the first-level cache; in the second, where the classes
    // lie apart, since memory gives short stretches slowly.
    static int64_t lanes(int64_t classes, int64_t across, bool apart) {
        const int64_t fit = (apart ? 262144 : 32768) / int64_t(sizeof(T)) / std::max<int64_t>(classes, 1);
        return std::clamp<int64_t>(std::min(fit / 16, (across + 15) / 16) * 16, 16, most);
    }

    void operator()(int64_t n, int64_t d0, int64_t count, double* losses) {
        // Whole vectors, for the same reason as in pointwise.h; the tile's tail is filled with zeros.
        const int64_t padded = (count + 15) / 16 * 16;
        read(n, d0, count, padded);
        settle(n, d0, count, padded);
        if (soft) gather_soft(n, d0, count, padded);
        // The own class leaves the sums.
        set_own(p.y, count, [](int64_t) { return -infinity; }, tile.data(), width);
        for (int64_t c = 0; c < a.c; ++c) exp_in_place(at(c), p.max, padded);
        own_exps(p, padded);
        const int64_t fours = a.c / 4 * 4;
        for (int64_t c = 0; c < fours; c += 4) add_four(p.others, at(c), width, padded);
        for (int64_t c = fours; c < a.c; ++c) add(p.others, at(c), padded);

        const double hard = double(r.hard);
        if (a.probabilities)
            position_losses<T, false, true>(p, padded, hard, losses);
        else if (soft)
            position_losses<T, true, true>(p, padded, hard, losses);
        else
            position_losses<T, true, false>(p, padded, hard, losses);
        if (!a.grad.data && !a.grad_target.data) return;

        incoming(n, d0, count, padded);
        const bool small = a.probabilities ? position_slopes<T, false, true>(p, padded, hard, 0)
                           : soft          ? position_slopes<T, true, true>(p, padded, hard, double(r.soft))
                                           : position_slopes<T, true, false>(p, padded, hard, 0);
        for (int64_t c = 0; c < a.c && small; ++c) multiply_each(at(c), p.lowering, padded, at(c), at(c));
        if (a.grad.data) write(n, d0, count, padded);
        if (a.grad_target.data) target_gradient(n, d0, count);
    }

private:
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T, for whole vectors
    static constexpr T infinity = std::numeric_limits<T>::infinity();
    static constexpr int64_t most = Positions<T>::most;
    static constexpr int64_t strip = 64;  // rows that are transposed at a time
    const Rows<T>& r;
    const RowsArgs& a;
    const int64_t width;
    const bool soft;
    bool any_ignored = false;
    std::vector<T> tile, parts, converted;
    Positions<T> p;
    alignas(64) Index largest[most];

    T* at(int64_t c) { return tile.data() + c * width; }
    T* part(int64_t c) { return parts.data() + c * width; }

    void read(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        std::fill_n(p.max, padded, -infinity);
        std::fill_n(p.others, padded, 0.0);
        std::fill_n(largest, padded, Index(0));
        const bool direct = dense(a.input) && !a.probabilities;
        if (!direct) load_tile(a.input, n, d0, count, tile.data());
        for (int64_t c = 0; c < a.c; ++c) {
            std::fill(at(c) + count, at(c) + padded, T(0));
            if (direct)
                copy_and_raise(stretch(a.input, n, d0, c), count, at(c), p.max,
                               after(a.input, n, d0, c, count));
            else if (a.probabilities)
                raise(p.max, largest, at(c), Index(c), padded);
            else
                raise(p.max, at(c), padded);
        }
        for (int64_t i = 0; i < padded; ++i) p.max[i] = p.max[i] == -infinity ? T(0) : p.max[i];
    }

    // Each position's own class, its logit and its weight.
    void settle(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        if (a.probabilities)
            std::copy_n(largest, count, p.y);
        else
            r.labels(n, d0, count, p.y);
        any_ignored = !a.probabilities && mark_ignored(p.y, count, a.ignore_index, p.ignored);
        std::fill(p.y + count, p.y + padded, p.ignored);
        own_logits(p, tile.data(), width, padded);
        for (int64_t i = 0; i < padded && !r.weight; ++i) p.weight[i] = p.y[i] >= 0 ? 1.0 : 0.0;
        for (int64_t i = 0; i < padded && r.weight; ++i)
            p.weight[i] = p.y[i] >= 0 ? double(r.weight[p.y[i]]) : 0.0;
    }

    void incoming(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        const double by = a.mean ? r.denominator : 1.0;
        std::fill_n(p.incoming, count, 1.0 / by);
        std::fill(p.incoming + count, p.incoming + padded, 0.0);
        if (!a.incoming.data) return;
        load_strided<double>(memory(a.incoming, row_start(a.incoming, n, d0)), a.incoming.dtype,
                             a.incoming.stride[2], count, p.incoming);
        for (int64_t i = 0; i < count && a.mean; ++i) p.incoming[i] /= by;
    }

    // The exps become the gradient.
    void write(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        const bool direct = dense(a.grad) && padded == count;  // whole vectors, again
        const auto to = [&](int64_t c) { return direct ? stretch(a.grad, n, d0, c) : at(c); };
        for (int64_t c = 0; c < a.c; ++c) {
            const T* next = direct ? after(a.grad, n, d0, c, count) : at(c);
            if (soft)
                slope(at(c), p.factor, p.g, part(c), padded, to(c), next);
            else
                multiply_each(at(c), p.factor, padded, to(c), next);
        }
        const T* own = p.own;
        set_own(p.y, count, [own](int64_t i) { return own[i]; }, to(0), direct ? a.grad.stride[1] : width);
        for (int64_t i = 0; i < count && any_ignored; ++i)
            for (int64_t c = 0; p.y[i] == p.ignored && c < a.c; ++c) to(c)[i] = T(0);
        if (!direct) store_tile(a.grad, n, d0, count);
    }

    // Whether each class's positions lie one behind the other, in T.
    bool dense(const Grid& grid) const { return grid.dtype == dtype_of<T> && grid.stride[2] == 1; }

    static T* stretch(const Grid& grid, int64_t n, int64_t d0, int64_t c) {
        return static_cast<T*>(grid.data) + row_start(grid, n, d0) + c * grid.stride[1];
    }

    // What is read or written after class c: the next class, or the next tile.
    const T* after(const Grid& grid, int64_t n, int64_t d0, int64_t c, int64_t count) const {
        return c + 1 < a.c ? stretch(grid, n, d0, c + 1) : stretch(grid, n, d0 + count, 0);
    }

    bool holds_rows(const Grid& grid) const { return grid.stride[1] == 1 && grid.stride[2] == a.c; }

    void load_tile(const Grid& grid, int64_t n, int64_t d0, int64_t count, T* to) {
        const int64_t first = row_start(grid, n, d0);
        if (holds_rows(grid)) {
            for (int64_t i = 0; i < count; i += strip) {
                const int64_t rows = std::min(strip, count - i);
                const T* from = load(memory(grid, first + i * a.c), grid.dtype, 1, rows * a.c, by_rows(grid));
                transpose(from, a.c, rows, a.c, to + i, width);
            }
            return;
        }
        for (int64_t c = 0; c < a.c; ++c)
            load_strided<T>(memory(grid, first + c * grid.stride[1]), grid.dtype, grid.stride[2], count,
                            to + c * width);
    }

    void store_tile(const Grid& grid, int64_t n, int64_t d0, int64_t count) {
        const int64_t first = row_start(grid, n, d0);
        if (holds_rows(grid)) {
            const bool direct = grid.dtype == dtype_of<T>;
            for (int64_t i = 0; i < count; i += strip) {
                const int64_t rows = std::min(strip, count - i);
                void* at = memory(grid, first + i * a.c);
                T* to = direct ? static_cast<T*>(at) : by_rows(grid);
                transpose(tile.data() + i, width, a.c, rows, to, a.c);
                if (!direct) store(at, grid.dtype, 1, rows * a.c, to);
            }
            return;
        }
        for (int64_t c = 0; c < a.c; ++c)
            store(memory(grid, first + c * grid.stride[1]), grid.dtype, grid.stride[2], count, at(c));
    }

    // Memory for a strip of the tile's rows, one behind the other, where they must be converted.
    T* by_rows(const Grid& grid) {
        if (grid.dtype != dtype_of<T>) converted.resize(size_t(strip * a.c));
        return converted.data();
    }

    void gather_soft(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        std::fill_n(p.dots, padded, 0.0);
        std::fill_n(p.masses, padded, 0.0);
        std::fill_n(p.rest, padded, 0.0);
        if (a.probabilities) load_tile(a.target, n, d0, count, parts.data());
        for (int64_t c = 0; c < a.c; ++c) {
            const T w = r.weight ? r.weight[c] : T(1);
            if (a.probabilities) {
                std::fill(part(c) + count, part(c) + padded, T(0));
                weigh<T>(part(c), r.hard * w, r.soft * w, nullptr, padded);
                add_but_largest(p.rest, part(c), largest, Index(c), padded);
            } else {
                std::fill_n(part(c), padded, r.soft * w);
                add(p.masses, part(c), padded);
            }
            add_products(p.dots, part(c), at(c), p.max, padded);
        }
        for (int64_t i = 0; i < count && a.probabilities; ++i)
            p.masses[i] = p.rest[i] + double(part(p.y[i])[i]);
    }

    void target_gradient(int64_t n, int64_t d0, int64_t count) {
        alignas(64) T x[most];
        for (int64_t c = 0; c < a.c; ++c) {
            load_strided<T>(memory(a.input, row_start(a.input, n, d0) + c * a.input.stride[1]), a.input.dtype,
                            a.input.stride[2], count, x);
            const T scale = r.hard * (r.weight ? r.weight[c] : T(1));
            for (int64_t i = 0; i < count; ++i) {
                const bool absent = part(c)[i] == T(0) && x[i] == -std::numeric_limits<T>::infinity();
                x[i] = absent ? T(0) : p.g[i] * scale * ((p.max[i] - x[i]) + T(p.log_sum[i]));
            }
            store(memory(a.grad_target, row_start(a.grad_target, n, d0) + c * a.grad_target.stride[1]),
                  a.grad_target.dtype, a.grad_target.stride[2], count, x);
        }
    }
};

// Returns -1, or the position (n * d) of the first class index that is out of range.
template <class T>
int64_t cross_entropy(RowsArgs a) {
    lay_along_d(a);
    Rows<T> rows(a);
    if (!a.probabilities) {
        if (const int64_t bad = rows.check(); bad >= 0) return bad;
    } else if (a.mean) {
        rows.denominator = double(rows.positions());
    }
    if (a.grad.data) advise_huge_pages(a.grad.data, rows.positions() * a.c * size_of(a.grad.dtype));

    // A tile has sixteen positions at least: where there are fewer, of very many classes, rows take less
    // memory.
    const bool wasteful = a.d < 16 && a.c > large_tile<T>;
    const bool tiles = !wasteful && (a.input.stride[1] != 1 || a.c <= short_row<T>);
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
