// The passes of an overlap over what is no softmax against class indices, in double.
#pragma once
#include "labels.h"
#include "overlap.h"

namespace fusedloss {

// Sigmoids, probabilities, and masks.
class Masks {
public:
    Masks(const DiceArgs& args, const Rows<double>&)
        : a(args), x(size_t(a.c * width)), q(x.size()), t(x.size()), y(size_t(width)) {}

    static int64_t lanes(const DiceArgs&) { return width; }

    double sums(int64_t n, int64_t d0, int64_t count, Sums* of) {
        read(n, d0, count);
        for (int64_t c = 0; c < a.c; ++c) of[c] += sums_of(row(x, c), row(q, c), row(t, c), ignored(), count);
        return 0;
    }

    void gradient(int64_t n, int64_t d0, int64_t count, const Slopes* slopes, double) {
        read(n, d0, count);
        for (int64_t c = 0; c < a.c; ++c) weigh(slopes[c], row(t, c), ignored(), count);
        if (a.activation == 0) softmax_slopes(count);
        for (int64_t c = 0; c < a.c; ++c) {
            if (a.activation == 1) sigmoid_slopes(row(x, c), row(q, c), row(t, c), count);
            const int64_t to = row_start(a.grad, n, d0) + c * a.grad.stride[1];
            store(memory(a.grad, to), a.grad.dtype, a.grad.stride[2], count, row(t, c));
        }
    }

private:
    static constexpr int64_t width = 64;
    const DiceArgs& a;
    std::vector<double> x, q, t;  // probabilities, 1 - these, and the target
    std::vector<int64_t> y;
    int64_t largest[width];  // classes

    double* row(std::vector<double>& v, int64_t c) { return v.data() + c * width; }
    // What the target is where it does not count.
    double ignored() const { return a.masks ? double(a.ignore_index) : -1.0; }

    static FUSEDLOSS_LOOP Sums sums_of(const double* __restrict p, const double* __restrict q,
                                       const double* __restrict t, double ignored, int64_t n) {
        double both[8] = {}, wrong[8] = {}, missed[8] = {}, size[8] = {};
        for (int64_t i = 0; i < n; i += 8) {
            const int64_t some = std::min<int64_t>(8, n - i);
#pragma omp simd
            for (int64_t j = 0; j < some; ++j) {
                const bool counts = t[i + j] != ignored;
                both[j] += counts ? p[i + j] * t[i + j] : 0.0;
                wrong[j] += counts ? p[i + j] * (1 - t[i + j]) : 0.0;
                missed[j] += counts ? q[i + j] * t[i + j] : 0.0;
                size[j] += counts ? t[i + j] : 0.0;
            }
        }
        return {tree_sum(both), tree_sum(wrong), tree_sum(missed), tree_sum(size)};
    }

    // t becomes dL/dp.
    static FUSEDLOSS_LOOP void weigh(const Slopes& s, double* __restrict t, double ignored, int64_t n) {
        const double inside = s.inside, outside = s.outside;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const double slope = t[i] * inside + (1 - t[i]) * outside;
            t[i] = t[i] != ignored ? slope : 0.0;
        }
    }

    // p (v - S), with v - S of the largest class as the others' part of it, and of these from there.
    void softmax_slopes(int64_t count) {
        double v[width], beyond[width];
        for (int64_t i = 0; i < count; ++i) {
            v[i] = row(t, largest[i])[i];
            beyond[i] = row(q, largest[i])[i] * v[i];
        }
        for (int64_t c = 0; c < a.c; ++c)
            for (int64_t i = 0; i < count; ++i)
                beyond[i] -= c == largest[i] ? 0.0 : row(x, c)[i] * row(t, c)[i];
        for (int64_t c = 0; c < a.c; ++c)
            for (int64_t i = 0; i < count; ++i)
                row(t, c)[i] = row(x, c)[i] * ((row(t, c)[i] - v[i]) + beyond[i]);
    }

    static void sigmoid_slopes(const double* p, const double* q, double* v, int64_t n) {
        for (int64_t i = 0; i < n; ++i) v[i] *= p[i] * q[i];
    }

    void read(int64_t n, int64_t d0, int64_t count) {
        for (int64_t c = 0; c < a.c; ++c) {
            const int64_t from = row_start(a.input, n, d0) + c * a.input.stride[1];
            load_strided(memory(a.input, from), a.input.dtype, a.input.stride[2], count, row(x, c));
        }
        read_target(n, d0, count);
        if (a.activation == 0) return softmax(count);
        for (int64_t c = 0; c < a.c; ++c) {
            double* p = row(x, c);
            double* rest = row(q, c);
            if (a.activation == 1) {
                math::map(rest, count, [](auto v) { return math::exp_minus_abs(v); }, p);
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) {
                    const double v = p[i], e = rest[i];
                    p[i] = math::sigmoid(v, e);
                    rest[i] = math::sigmoid(-v, e);
                }
            } else {
                for (int64_t i = 0; i < count; ++i) rest[i] = 1 - p[i];
            }
        }
    }

    void read_target(int64_t n, int64_t d0, int64_t count) {
        if (!a.masks) {
            load_indices(a.target.data, a.target.dtype, row_start(a.target, n, d0), a.target.stride[2], count,
                         y.data());
            for (int64_t c = 0; c < a.c; ++c)
                for (int64_t i = 0; i < count; ++i) {
                    const bool counts = y[size_t(i)] != a.ignore_index;
                    row(t, c)[i] = counts ? double(y[size_t(i)] == c) : ignored();
                    row(x, c)[i] = counts ? row(x, c)[i] : 0.0;  // which may be NaN
                }
            return;
        }
        const bool numbers = a.target.dtype < I64;
        for (int64_t c = 0; c < a.c; ++c) {
            const int64_t from = row_start(a.target, n, d0) + c * a.target.stride[1];
            if (numbers) {
                load_strided(memory(a.target, from), a.target.dtype, a.target.stride[2], count, row(t, c));
                continue;
            }
            load_indices(a.target.data, a.target.dtype, from, a.target.stride[2], count, y.data());
            for (int64_t i = 0; i < count; ++i) row(t, c)[i] = double(y[size_t(i)]);
        }
    }

    // The largest class has its 1 - p from the others.
    void softmax(int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            int64_t& top = largest[i];
            top = 0;
            for (int64_t c = 1; c < a.c; ++c)
                if (row(x, c)[i] > row(x, top)[i]) top = c;
            const double max = row(x, top)[i];
            double others = 0;
            for (int64_t c = 0; c < a.c; ++c) {
                row(x, c)[i] = math::exp(row(x, c)[i] - max);
                others += c == top ? 0.0 : row(x, c)[i];
            }
            const double total = others + row(x, top)[i];
            for (int64_t c = 0; c < a.c; ++c) {
                row(q, c)[i] = (c == top ? others : total - row(x, c)[i]) / total;
                row(x, c)[i] /= total;
            }
        }
    }
};

}  // namespace fusedloss
