// Cross entropy, vectorised along the rows.
#pragma once
#include "focal.h"
#include "labels.h"
#include "softmax.h"

namespace fusedloss {

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
        double own_weight = y < 0 ? 0 : double(r.hard) * r.class_weight(y);
        double loss = s.mass != 0 || a.probabilities ? s.soft_loss() : 0;
        if (y >= 0) loss += own_weight * s.own_loss();
        if (a.gamma != 0) {
            const double sum = s.raised_sum();
            with_power(a.gamma, [&](auto square) {
                constexpr bool is_square = decltype(square)::value;
                const Focal f = focal<is_square>(s.own / sum, s.others / sum, s.own_loss(), a.gamma);
                loss *= f.value;
                own_weight *= f.slope;
            });
        }
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

}  // namespace fusedloss
