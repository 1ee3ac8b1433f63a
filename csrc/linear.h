// One step over rows of a chunk of logits, for heads whose logits never exist as a whole.
//
// A row's classes may come in several stretches: each is gathered into the row's sums, and when all have been
// seen the row is finished. Where a gradient is wanted all classes are given at once, and it takes the
// logits' place. Of a process that has but a shard of the classes they are gathered, what all processes
// gathered is merged, and the row is finished by that. With x' = softcap tanh(logit_scale x / softcap), b and
// B as in cross_entropy.h, and L the row's log-sum-exp:
//   loss = sum_c b_c (L - x'_c) + z_loss L^2,   entropy = L - sum_c p_c x'_c.
#pragma once
#include <memory>
#include <numeric>

#include "softmax.h"

namespace fusedloss {

// What is gathered of a row.
template <class T>
struct LinearSums : RowSums<T> {
    double top = -std::numeric_limits<double>::infinity();
    double products = 0;  // sum of exp(x - max) (x - max), raised

    // Relative to another maximum, which the old one is `gap` above.
    double products_to(double gap) const {
        return std::exp(gap) > 0 ? brought(products + gap * this->raised_sum(), gap) : 0;
    }
};
static_assert(sizeof(LinearSums<float>) == linear_sums * sizeof(double));

// Within 2 ULP: a rational approximation near 0 (Cephes), else from exp(-2 |u|).
template <class T>
inline T tanh_of(T u) {
    const T z = u * u, size = std::fabs(u), e = math::exp_softmax(T(-2) * size);
    const T p =
        (T(-9.64399179425052238628e-1) * z + T(-9.92877231001918586564e1)) * z + T(-1.61468768441708447952e3);
    const T q = ((z + T(1.12811678491632931402e2)) * z + T(2.23548839060100448583e3)) * z +
                T(4.84406305325125486048e3);
    const T far = std::copysign((T(1) - e) / (T(1) + e), u);
    return size < T(0.625) ? u + u * z * (p / q) : (u != u ? u : far);
}

// The sum of part * (x - origin). 0 * -inf is 0 here: a class without probability does not count.
template <class T>
FUSEDLOSS_LOOP double dot(const T* __restrict part, const T* __restrict x, double origin, int64_t n) {
    constexpr int width = 16;
    double sums[width] = {};
    const int64_t whole = n - n % width;
    const auto term = [&](int64_t i) {
        const double product = double(part[i]) * (double(x[i]) - origin);
        return part[i] == T(0) && x[i] == x[i] ? 0.0 : product;
    };
    for (int64_t i = 0; i < whole; i += width)
        for (int j = 0; j < width; ++j) sums[j] += term(i + j);
    for (int64_t i = whole; i < n; ++i) sums[i - whole] += term(i);
    return ordered_sum(sums, width);
}

// An infinite logit lost NaN to its rounding.
template <class T>
FUSEDLOSS_LOOP void add_low(T* __restrict x, const bf16* __restrict low, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const T lost = T(float(low[i]));
        x[i] += lost == lost ? lost : T(0);
    }
}

template <class T>
FUSEDLOSS_LOOP void add_bias(const T* x, const T* __restrict bias, int64_t n, T* y) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] + bias[i];
}

// `count` logits of row n from class c on, in `buffer` or where they lie.
template <class T>
inline const T* load_logits(const Logits& x, int64_t n, int64_t c, int64_t count, T* buffer) {
    const T* found = load<T>(memory(x, n, c), x.dtype, 1, count, buffer);
    if (x.low) add_low(buffer, static_cast<const bf16*>(x.low) + offset_of(x, n, c), count);
    if (!x.bias) return found;
    add_bias(found, static_cast<const T*>(x.bias) + c, count, buffer);
    return buffer;
}

template <class T>
FUSEDLOSS_LOOP void scale_into(const T* __restrict x, T factor, int64_t n, T* __restrict y) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
}

template <class T>
FUSEDLOSS_LOOP void cap_into(const T* __restrict x, T factor, T cap, int64_t n, T* __restrict y) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = cap * tanh_of(x[i] * factor);
}

// The raised exp(x - origin) times a factor, less `flat`, in place.
template <class T>
FUSEDLOSS_LOOP void soften(T* __restrict x, T origin, T factor, T flat, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = math::exp_raised(x[i] - origin) * factor - flat;
}

// exp(x - origin) * scale - flat, in place
template <class T>
inline void soften_by(T* x, T origin, double scale, T flat, int64_t n) {
    if (!too_small<T>(scale)) return soften(x, origin, T(scale * double(math::lowered<T>)), flat, n);
    soften(x, origin, math::lowered<T>, T(0), n);
    scale_and_shift(x, T(scale), flat, n);
}

// e becomes e (factor + slope (x - origin)); where e is 0 the product is, too.
template <class T>
FUSEDLOSS_LOOP void tilt(T* __restrict e, const T* __restrict x, T origin, T factor, T slope, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) e[i] = e[i] == T(0) ? T(0) : e[i] * (factor + slope * (x[i] - origin));
}

// The derivative of the cap, from what it gave.
template <class T>
FUSEDLOSS_LOOP void uncap(T* __restrict g, const T* __restrict x, T inverse_cap, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const T t = x[i] * inverse_cap;
        g[i] *= (T(1) - t) * (T(1) + t);
    }
}

template <class T>
FUSEDLOSS_LOOP void take(T* __restrict g, T factor, const T* __restrict part, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) g[i] -= factor * part[i];
}

// Of a product and a bias the bound is the size of the sum and of the largest finite bias.
template <class T>
double largest_bias(const Logits& x, int64_t classes) {
    double largest = 0;
    for (int64_t c = 0; x.bias && c < classes; ++c) {
        const double size = std::fabs(double(static_cast<const T*>(x.bias)[c]));
        if (std::isfinite(size)) largest = std::max(largest, size);
    }
    return largest;
}

// Whether the roundings of a row's logits count.
inline bool is_beyond(double largest, double ordinary) { return !(std::fabs(largest) <= ordinary); }

// How many rows stayed as they were.
inline int64_t count_beyond(const int64_t* beyond, int64_t n) {
    const int64_t count = beyond ? std::accumulate(beyond, beyond + n, int64_t(0)) : 0;
    return count ? count : int64_t(fine);
}

template <class T>
class LinearKernel {
public:
    explicit LinearKernel(const LinearArgs& args)
        : a(args), weight(static_cast<const T*>(args.weight)), hard(T(1 - args.smoothing)) {
        soft = a.smoothing > 0 ? T(a.smoothing / double(a.c)) : T(0);
        mixed = !a.label || soft != T(0);
        if (a.beyond) ordinary = a.ordinary - std::fabs(a.logit_scale) * largest_bias<T>(a.logits, a.columns);
    }

    void operator()(int64_t n) {
        LinearSums<T> s;
        auto* kept = a.sums ? reinterpret_cast<LinearSums<T>*>(a.sums) + n : nullptr;
        if (kept && !a.begin) s = *kept;
        if (a.given) {
            if (!(a.beyond && a.beyond[n])) finish(n, s);
            return;
        }
        gather(n, s);
        if (kept) *kept = s;
        if (a.beyond && (a.beyond[n] = is_beyond(s.max, ordinary))) return;
        if (a.finish) finish(n, s);
    }

private:
    const LinearArgs& a;
    const T* weight;
    T hard, soft;
    bool mixed;  // b has more than the target's class
    double ordinary = 0;
    alignas(64) T x_buffer[row_block], e_buffer[row_block], q_buffer[row_block];

    static double value(const double* of_rows, int64_t n, double absent) {
        return of_rows ? of_rows[n] : absent;
    }

    // x' of `count` of the given classes from the c-th on.
    const T* capped(int64_t n, int64_t c, int64_t count) {
        const T* x = load_logits(a.logits, n, c, count, x_buffer);
        if (a.softcap > 0)
            cap_into(x, T(a.logit_scale / a.softcap), T(a.softcap), count, e_buffer);
        else if (a.logit_scale != 1)
            scale_into(x, T(a.logit_scale), count, e_buffer);
        else
            return x;
        std::copy_n(e_buffer, count, x_buffer);
        return x_buffer;
    }

    // b_c but for the part of the target's class; null where it is `soft` for all.
    const T* soft_part(int64_t n, int64_t c, int64_t count) {
        const T* w = weight ? weight + a.first + c : nullptr;
        if (!a.label) {
            const int64_t offset = n * a.target.stride[0] + (a.first - a.origin + c) * a.target.stride[1];
            load_strided<T>(memory(a.target, offset), a.target.dtype, a.target.stride[1], count, q_buffer);
        } else if (w) {
            std::fill_n(q_buffer, count, T(0));
        } else {
            return nullptr;
        }
        weigh(q_buffer, hard, soft, w, count);
        return q_buffer;
    }

    void gather(int64_t n, LinearSums<T>& s) {
        T max = T(s.top);
        const int64_t y = a.label ? a.label[n] - a.first : -1;
        for (int64_t c = 0; c < a.columns; c += row_block) {
            const int64_t count = std::min(row_block, a.columns - c);
            const T* x = capped(n, c, count);
            const T top = greatest(x, count, max);
            const T origin = top == -std::numeric_limits<T>::infinity() ? T(0) : top;
            if (top > max && s.raised_sum() > 0) {
                // What was gathered relative to the old maximum is brought to the new one.
                const double gap = double(max) - double(top);
                s.products = s.products_to(gap);
                s.others = brought(s.others, gap);
                s.own = brought(s.own, gap);
            }
            if (s.mass != 0) s.dot += s.mass * (s.max - double(origin));
            const bool raised = top > max;
            max = top;
            s.max = double(origin);
            const void* next = memory(a.logits, n, c + count);
            exp_of_difference(x, origin, count, e_buffer, next, size_of(a.logits.dtype));
            if (a.entropy || a.incoming_entropy) s.products += dot<T>(e_buffer, x, s.max, count);
            if (y >= c && y < c + count) {
                s.own = double(e_buffer[y - c]);
                s.own_x = double(x[y - c]);
                e_buffer[y - c] = T(0);
            }
            if (!a.label && raised) {
                s.others += s.own;  // the class that was the largest is one of the others now
                const int64_t at = first_one(e_buffer, count);
                s.own = at < count ? double(math::raised<T>) : 0;
                if (at < count) e_buffer[at] = T(0);
            }
            s.others += quick_sum(e_buffer, count);
            if (!mixed) continue;
            if (const T* part = soft_part(n, c, count)) {
                s.mass += ordered_sum(part, count);
                s.dot += dot<T>(part, x, s.max, count);
            } else {
                s.mass += double(soft) * double(count);
                s.dot += double(soft) * (ordered_sum(x, count) - double(count) * s.max);
            }
        }
        s.top = double(max);
    }

    void finish(int64_t n, const LinearSums<T>& s) {
        const double log_sum = s.log_sum(), lse = s.max + log_sum;
        const double mean_x = s.products / s.raised_sum();  // of x - max
        const double own_weight = a.label ? double(hard) * (weight ? double(weight[a.label[n]]) : 1.0) : 0.0;
        double loss = mixed ? s.soft_loss() : 0.0;
        if (a.label) loss += own_weight * s.own_loss();
        if (a.z_loss != 0) loss += a.z_loss * lse * lse;
        if (a.loss) a.loss[n] = loss;
        if (a.lse) a.lse[n] = lse;
        if (a.entropy) a.entropy[n] = log_sum - mean_x;
        if (a.correct) a.correct[n] = a.label && s.own_x == s.top;
        const double g = value(a.incoming, n, 1.0);
        // First, since the other overwrites the logits.
        if (a.grad_target.data) target_gradient(n, s.max, log_sum, g);
        if (a.differentiate) differentiate(n, s, own_weight, lse, mean_x, g);
    }

    void differentiate(int64_t n, const LinearSums<T>& s, double own_weight, double lse, double mean_x,
                       double g) {
        // The gradient is p (even + slope (x' - max)) - g b.
        g *= a.logit_scale;
        const double slope = -value(a.incoming_entropy, n, 0.0) * a.logit_scale;
        const double rest = g * (s.mass + 2 * a.z_loss * lse) - slope * mean_x +
                            value(a.incoming_lse, n, 0.0) * a.logit_scale;
        const double even = (g * own_weight + rest) / s.sum(), tilted = slope / s.sum();
        const T by = too_small<T>(std::max(std::fabs(even), std::fabs(tilted))) ? math::lowered<T> : T(1);
        const double unit = double(math::lowered<T>) / double(by);
        const int64_t y = a.label ? a.label[n] - a.first : -1;
        const bool direct = a.logits.dtype == dtype_of<T>;
        for (int64_t c = 0; c < a.columns; c += row_block) {
            const int64_t count = std::min(row_block, a.columns - c);
            const T* x = capped(n, c, count);
            T* e = direct ? static_cast<T*>(memory(a.logits, n, c)) : e_buffer;
            // x' is needed again where it bends the gradient.
            if ((tilted != 0 || a.softcap > 0) && x != x_buffer) std::copy_n(x, count, x_buffer);
            if (e != x) std::copy_n(x, count, e);
            const T* part = mixed ? soft_part(n, c, count) : nullptr;
            const T flat = part ? T(0) : T(g) * soft;
            if (tilted != 0) {
                soften(e, T(s.max), by, T(0), count);
                tilt(e, x_buffer, T(s.max), T(even * unit), T(tilted * unit), count);
                if (flat != T(0))
                    for (int64_t i = 0; i < count; ++i) e[i] -= flat;
            } else {
                soften_by(e, T(s.max), even, flat, count);
            }
            if (part) take(e, T(g), part, count);
            // p - 1 as minus the others' share: exact where p is near 1.
            if (y >= c && y < c + count) {
                const double share = s.own / s.raised_sum(), bend = slope * (s.own_x - s.max) * share;
                e[y - c] =
                    T(rest * share + (share > 0 ? bend : 0.0) - g * own_weight * (s.others / s.raised_sum()) -
                      g * double(soft) * (weight ? double(weight[a.label[n]]) : 1.0));
            }
            if (a.softcap > 0) uncap(e, x_buffer, T(1 / a.softcap), count);
            if (!direct) store(memory(a.logits, n, c), a.logits.dtype, 1, count, e);
        }
    }

    void target_gradient(int64_t n, double max, double log_sum, double g) {
        const T scale = T(g) * hard, top = T(max), rest = T(log_sum);
        for (int64_t c = 0; c < a.columns; c += row_block) {
            const int64_t count = std::min(row_block, a.columns - c);
            const T* x = capped(n, c, count);
            for (int64_t i = 0; i < count; ++i) e_buffer[i] = scale * ((top - x[i]) + rest);
            if (weight)
                for (int64_t i = 0; i < count; ++i) e_buffer[i] *= weight[a.first + c + i];
            const int64_t offset =
                n * a.grad_target.stride[0] + (a.first - a.origin + c) * a.grad_target.stride[1];
            store(memory(a.grad_target, offset), a.grad_target.dtype, a.grad_target.stride[1], count,
                  e_buffer);
        }
    }
};

template <class T>
void linear_rows(const LinearArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, a.columns));
    parallel_ranges(a.n, grain, [&](int64_t begin, int64_t end) {
        const auto kernel = std::make_unique<LinearKernel<T>>(a);
        for (int64_t n = begin; n < end; ++n) (*kernel)(n);
    });
}

// What processes gathered of a row, each of its own classes, in the order of their ranks.
template <class Sums>
Sums merged(const Sums* parts, int64_t ranks, int64_t stride, bool labelled) {
    Sums all;
    for (int64_t k = 0; k < ranks; ++k) all.top = std::max(all.top, parts[k * stride].top);
    all.max = all.top == -std::numeric_limits<double>::infinity() ? 0 : all.top;
    bool owned = labelled;
    for (int64_t k = 0; k < ranks; ++k) {
        const Sums& s = parts[k * stride];
        const double gap = s.max == all.max ? 0.0 : s.max - all.max;
        all.own_x += s.own_x;  // of the process that has the class, and 0 of the others
        all.mass += s.mass;
        all.dot += s.dot + (s.mass != 0 ? s.mass * gap : 0.0);
        if (s.raised_sum() == 0) continue;
        const double own = brought(s.own, gap);
        const bool is_own = labelled || (!owned && s.top == all.top);
        all.others += brought(s.others, gap) + (is_own ? 0.0 : own);
        all.own += is_own ? own : 0.0;
        owned = owned || is_own;
        all.products += s.products_to(gap);
    }
    return all;
}

inline void merge_sums(const MergeArgs& a) {
    using Sums = LinearSums<float>;  // of another type they are laid out alike
    const auto* parts = reinterpret_cast<const Sums*>(a.parts);
    parallel_ranges(a.n, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
            reinterpret_cast<Sums*>(a.sums)[n] = merged(parts + n, a.ranks, a.n, a.labelled != 0);
    });
}

FUSEDLOSS_LOOP inline void add_terms(float* __restrict sums, const bf16* __restrict terms, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += float(terms[i]);
}

// Sums of the products of chunks.
inline void accumulate(const AccumulateArgs& a) {
    parallel(a.rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, a.columns)), [&](int64_t r) {
        const bf16* terms = static_cast<const bf16*>(a.terms) + r * a.columns;
        if (a.add)
            add_terms(a.sums + r * a.stride, terms, a.columns);
        else
            load_strided(terms, BF16, 1, a.columns, a.sums + r * a.stride);
    });
}

}  // namespace fusedloss
