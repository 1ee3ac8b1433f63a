// The divergence of a row of a student's logits from a teacher's, for heads whose logits never exist as a
// whole.
//
// With log p_s and log p_t the log-softmax of both at the temperature, m = beta p_t + (1 - beta) p_s and l
// the log:
//   forward  sum_c p_t (l p_t - l p_s)                                    slope  p_s - p_t
//   reverse  K = sum_c p_s (l p_s - l p_t)                                slope  p_s (l p_s - l p_t - K)
//   js       beta sum_c p_t (l p_t - l m) + (1 - beta) K,                 slope  (1 - beta) p_s (l p_s - l m
//   - K)
//            K = sum_c p_s (l p_s - l m)
#pragma once
#include "linear.h"

namespace fusedloss {

struct CappedLogits : Logits {
    double softcap;
};

// Packed by cpu/linear.py; the field order is shared with it.
struct DistillArgs {
    int64_t n, c;
    int64_t kind;           // 0 forward, 1 reverse, 2 js
    int64_t differentiate;  // the student's logits become their gradient
    double beta, temperature, soft_weight, hard_weight;
    CappedLogits student, teacher;
    const int64_t* label;  // of the hard term, or null
    const double* incoming;
    double* loss;
};

// The log-sum-exp of what comes in stretches.
struct RunningLse {
    double max = -std::numeric_limits<double>::infinity(), sum = 0;

    template <class T>
    void add(const T* x, int64_t n, T* buffer) {
        const T top = greatest(x, n, T(max));
        const T origin = top == -std::numeric_limits<T>::infinity() ? T(0) : top;
        if (sum > 0) sum *= std::exp(max - double(top));
        max = double(top);
        exp_of_difference(x, origin, n, buffer, x + n, sizeof(T));
        sum += quick_sum(buffer, n);
    }
    double value() const { return sum > 0 ? max + std::log(sum) : max; }
};

template <class T>
FUSEDLOSS_LOOP void logarithms_of(T* __restrict x, T lse, T* __restrict p, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        x[i] -= lse;
        p[i] = math::exp(x[i]);
    }
}

// p (a - b), and 0 where p is.
template <class T>
FUSEDLOSS_LOOP void weigh_gap(const T* __restrict p, const T* __restrict a, const T* __restrict b, T shift,
                              T* __restrict out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = p[i] == T(0) ? T(0) : p[i] * (a[i] - b[i] - shift);
}

template <class T>
FUSEDLOSS_LOOP void mix(const T* __restrict p, const T* __restrict q, T beta, T* __restrict log_m,
                        int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) log_m[i] = math::log(beta * q[i] + (T(1) - beta) * p[i]);
}

template <class T>
FUSEDLOSS_LOOP void subtract(const T* __restrict a, const T* __restrict b, T* __restrict out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = a[i] - b[i];
}

template <class T>
class DistillKernel {
public:
    explicit DistillKernel(const DistillArgs& args) : a(args) {}

    void operator()(int64_t n) {
        RunningLse hard, student, teacher;
        each(n, false, [&](int64_t, int64_t count) {
            student.add(s, count, out);
            teacher.add(t, count, out);
        });
        double own = 0;
        if (a.label)
            hard_blocks(n, [&](int64_t c, int64_t count) {
                hard.add(s, count, out);
                if (a.label[n] >= c && a.label[n] < c + count) own = double(s[a.label[n] - c]);
            });
        lse_s = T(student.value());
        lse_t = T(teacher.value());
        double forward = 0, reverse = 0;  // the sums weighted by p_t and p_s
        each(n, true, [&](int64_t, int64_t count) {
            const T* other = a.kind == 2 ? log_m : t;
            if (a.kind != 1) {
                weigh_gap(q, t, a.kind == 2 ? log_m : s, T(0), out, count);
                forward += ordered_sum(out, count);
            }
            if (a.kind != 0) {
                weigh_gap(p, s, other, T(0), out, count);
                reverse += ordered_sum(out, count);
            }
        });
        const double soft = a.kind == 0   ? forward
                            : a.kind == 1 ? reverse
                                          : a.beta * forward + (1 - a.beta) * reverse;
        const double lse = hard.value();
        a.loss[n] = a.soft_weight * soft + (a.label ? a.hard_weight * (lse - own) : 0.0);
        if (a.differentiate) differentiate(n, reverse, lse);
    }

private:
    const DistillArgs& a;
    T lse_s = 0, lse_t = 0;
    alignas(64) T s[row_block], t[row_block], p[row_block], q[row_block], log_m[row_block], out[row_block],
        capped[row_block];

    // x' of a stretch of a row, divided by the temperature.
    void read(const CappedLogits& x, int64_t n, int64_t c, int64_t count, double temperature, T* to) {
        const T* found = load_logits(x, n, c, count, to);
        if (found != to) std::copy_n(found, count, to);
        if (x.softcap > 0) {
            std::copy_n(to, count, out);
            cap_into(out, T(1 / x.softcap), T(x.softcap), count, to);
        }
        if (temperature != 1) scale_and_shift(to, T(1 / temperature), T(0), count);
    }

    // f(c, count) with s and t read, or the logarithms and p, q (and log_m) of them.
    template <class F>
    void each(int64_t n, bool logarithms, F&& f) {
        for (int64_t c = 0; c < a.c; c += row_block) {
            const int64_t count = std::min(row_block, a.c - c);
            read(a.student, n, c, count, a.temperature, s);
            read(a.teacher, n, c, count, a.temperature, t);
            if (logarithms) {
                logarithms_of(s, lse_s, p, count);
                logarithms_of(t, lse_t, q, count);
                if (a.kind == 2) mix(p, q, T(a.beta), log_m, count);
            }
            f(c, count);
        }
    }

    template <class F>
    void hard_blocks(int64_t n, F&& f) {
        for (int64_t c = 0; c < a.c; c += row_block) {
            const int64_t count = std::min(row_block, a.c - c);
            read(a.student, n, c, count, 1.0, s);
            f(c, count);
        }
    }

    void differentiate(int64_t n, double mean, double lse) {
        const double g = a.incoming ? a.incoming[n] : 1.0;
        const double scale = g * a.soft_weight / a.temperature * (a.kind == 2 ? 1 - a.beta : 1.0);
        each(n, true, [&](int64_t c, int64_t count) {
            if (a.kind == 0)
                subtract(p, q, out, count);
            else
                weigh_gap(p, s, a.kind == 2 ? log_m : t, T(mean), out, count);
            scale_and_shift(out, T(scale), T(0), count);
            std::copy_n(out, count, q);  // `read` needs `out`
            if (a.label || a.student.softcap > 0) read(a.student, n, c, count, 1.0, s);
            if (a.student.softcap > 0) std::copy_n(s, count, capped);
            if (a.label) {
                soften(s, T(lse), T(g * a.hard_weight), T(0), count);
                const int64_t y = a.label[n];
                if (y >= c && y < c + count) s[y - c] -= T(g * a.hard_weight);
                take(q, T(-1), s, count);
            }
            if (a.student.softcap > 0) uncap(q, capped, T(1 / a.student.softcap), count);
            store(a.student.memory(n, c), a.student.dtype, 1, count, q);
        });
    }
};

template <class T>
void distill_rows(const DistillArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, a.c));
    parallel_ranges(a.n, grain, [&](int64_t begin, int64_t end) {
        DistillKernel<T> kernel(a);
        for (int64_t n = begin; n < end; ++n) kernel(n);
    });
}

}  // namespace fusedloss
