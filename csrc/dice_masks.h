// The passes of an overlap over what is no softmax against class indices.
#pragma once
#include "labels.h"
#include "overlap.h"

namespace fusedloss {

// Sigmoids, probabilities, and masks. In float where nothing cancels: for the softmax's slopes T is double.
template <class T>
class Masks {
public:
    Masks(const DiceArgs& args, const Rows<T>&)
        : a(args),
          together(a.activation == 0),
          width(lanes(a)),
          x(size_t((together ? a.c : 1) * width)),
          q(x.size()),
          t(x.size()),
          y(size_t(width)),
          largest(y.size()),
          v(y.size()),
          beyond(y.size()) {}

    // What the first-level cache holds of three numbers an element.
    static int64_t lanes(const DiceArgs& a) {
        const int64_t rows = a.activation == 0 ? std::max<int64_t>(a.c, 1) : 4;
        return std::clamp<int64_t>(2048 / rows / group * group, group, 8 * group);
    }

    double sums(int64_t n, int64_t d0, int64_t count, Sums* of) {
        read(n, d0, count);
        for (int64_t c = 0; c < a.c; ++c) {
            if (!together) {
                read_class(n, d0, count, c);
                activate(c, count);
            }
            of[c] += sums_of(row(x, c), row(q, c), row(t, c), ignored(), count);
        }
        return 0;
    }

    void gradient(int64_t n, int64_t d0, int64_t count, const Slopes* slopes, double) {
        read(n, d0, count);
        for (int64_t c = 0; together && c < a.c; ++c) weigh(slopes[c], row(t, c), ignored(), count);
        if (together) softmax_slopes(count);
        for (int64_t c = 0; c < a.c; ++c) {
            if (!together) {
                read_class(n, d0, count, c);
                if (a.activation == 1)
                    sigmoid_slopes(slopes[c], exps(c, count), row(t, c), ignored(), count);
                else
                    weigh(slopes[c], row(t, c), ignored(), count);
            }
            const int64_t to = row_start(a.grad, n, d0) + c * a.grad.stride[1];
            store(memory(a.grad, to), a.grad.dtype, a.grad.stride[2], count, row(t, c));
        }
    }

private:
    static constexpr int64_t group = 64;
    const DiceArgs& a;
    const bool together;  // the classes of a place, as the softmax needs them; else one after the other
    const int64_t width;
    std::vector<T> x, q, t;           // probabilities, 1 - these, and the target
    std::vector<int64_t> y, largest;  // classes
    std::vector<double> v, beyond;

    T* row(std::vector<T>& of, int64_t c) { return of.data() + (together ? c * width : 0); }
    // What the target is where it does not count.
    T ignored() const { return a.masks ? T(a.ignore_index) : T(-1); }

    // Of terms of one sign: see quick_sum.
    static FUSEDLOSS_LOOP Sums sums_of(const T* __restrict p, const T* __restrict q, const T* __restrict t,
                                       T ignored, int64_t n) {
        constexpr int64_t lanes = 16;
        double both[lanes] = {}, wrong[lanes] = {}, missed[lanes] = {}, size[lanes] = {};
        T terms[4][group] = {};
        for (int64_t i = 0; i < n; i += group) {
            const int64_t some = std::min(group, n - i);
            if (some < group) std::fill_n(terms[0], 4 * group, T(0));
#pragma omp simd
            for (int64_t j = 0; j < some; ++j) {
                const bool counts = t[i + j] != ignored;
                terms[0][j] = counts ? p[i + j] * t[i + j] : T(0);
                terms[1][j] = counts ? p[i + j] * (T(1) - t[i + j]) : T(0);
                terms[2][j] = counts ? q[i + j] * t[i + j] : T(0);
                terms[3][j] = counts ? t[i + j] : T(0);
            }
            add_group(terms[0], both);
            add_group(terms[1], wrong);
            add_group(terms[2], missed);
            add_group(terms[3], size);
        }
        return {tree_sum(both), tree_sum(wrong), tree_sum(missed), tree_sum(size)};
    }

    // t becomes dL/dp.
    static FUSEDLOSS_LOOP void weigh(const Slopes& s, T* __restrict t, T ignored, int64_t n) {
        const double inside = s.inside, outside = s.outside;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const double some = double(t[i]), slope = some * inside + (1 - some) * outside;
            t[i] = t[i] != ignored ? T(slope) : T(0);
        }
    }

    // p (v - S), with v - S of the largest class as the others' part of it, and of these from there.
    void softmax_slopes(int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t top = largest[size_t(i)];
            v[size_t(i)] = double(row(t, top)[i]);
            beyond[size_t(i)] = double(row(q, top)[i]) * v[size_t(i)];
        }
        for (int64_t c = 0; c < a.c; ++c)
            take_others(row(x, c), row(t, c), largest.data(), c, count, beyond.data());
        for (int64_t c = 0; c < a.c; ++c) slopes_of(row(x, c), v.data(), beyond.data(), count, row(t, c));
    }

    static FUSEDLOSS_LOOP void take_others(const T* __restrict p, const T* __restrict v,
                                           const int64_t* __restrict largest, int64_t c, int64_t n,
                                           double* __restrict beyond) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) beyond[i] -= largest[i] == c ? 0.0 : double(p[i]) * double(v[i]);
    }

    static FUSEDLOSS_LOOP void slopes_of(const T* __restrict p, const double* __restrict of_largest,
                                         const double* __restrict beyond, int64_t n, T* __restrict v) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) v[i] = T(double(p[i]) * ((double(v[i]) - of_largest[i]) + beyond[i]));
    }

    // e / (1 + e) as e - e t, of which t is the same: its rounding then hardly counts.
    static double part(T e) {
        const T rounded = e / (T(1) + e);
        return double(e) - double(e) * double(rounded);
    }

    // t becomes dL/dx, from e = exp(-|x|).
    static FUSEDLOSS_LOOP void sigmoid_slopes(const Slopes& s, const T* __restrict e, T* __restrict t,
                                              T ignored, int64_t n) {
        const double inside = s.inside, outside = s.outside;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const double some = double(t[i]), slope = some * inside + (1 - some) * outside;
            const double less = part(e[i]);
            t[i] = t[i] != ignored ? T(slope * (less * (1 - less))) : T(0);
        }
    }

    const T* exps(int64_t c, int64_t count) {
        math::map(row(q, c), count, [](auto logit) { return math::exp_minus_abs(logit); }, row(x, c));
        return row(q, c);
    }

    // p and 1 - p, from the logits and exp(-|logits|).
    static FUSEDLOSS_LOOP void sigmoids(T* __restrict x, T* __restrict e, int64_t n) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const T logit = x[i], less = e[i];
            x[i] = math::sigmoid(logit, less);
            e[i] = math::sigmoid(-logit, less);
        }
    }

    void read(int64_t n, int64_t d0, int64_t count) {
        if (!a.masks)
            load_indices(a.target.data, a.target.dtype, row_start(a.target, n, d0), a.target.stride[2], count,
                         y.data());
        for (int64_t c = 0; together && c < a.c; ++c) read_class(n, d0, count, c);
        if (together) softmax(count);
    }

    void read_class(int64_t n, int64_t d0, int64_t count, int64_t c) {
        const int64_t from = row_start(a.input, n, d0) + c * a.input.stride[1];
        load_strided(memory(a.input, from), a.input.dtype, a.input.stride[2], count, row(x, c));
        read_target(n, d0, count, c);
    }

    void activate(int64_t c, int64_t count) {
        if (a.activation == 1) {
            exps(c, count);
            sigmoids(row(x, c), row(q, c), count);
        } else {
            for (int64_t i = 0; i < count; ++i) row(q, c)[i] = T(1) - row(x, c)[i];
        }
    }

    void read_target(int64_t n, int64_t d0, int64_t count, int64_t c) {
        T* to = row(t, c);
        if (!a.masks) {
            for (int64_t i = 0; i < count; ++i) {
                const bool counts = y[size_t(i)] != a.ignore_index;
                to[i] = counts ? T(y[size_t(i)] == c) : ignored();
                row(x, c)[i] = counts ? row(x, c)[i] : T(0);  // which may be NaN
            }
            return;
        }
        const int64_t from = row_start(a.target, n, d0) + c * a.target.stride[1];
        if (a.target.dtype < I64)
            return load_strided(memory(a.target, from), a.target.dtype, a.target.stride[2], count, to);
        load_indices(a.target.data, a.target.dtype, from, a.target.stride[2], count, y.data());
        for (int64_t i = 0; i < count; ++i) to[i] = T(y[size_t(i)]);
    }

    // The largest class has its 1 - p from the others.
    void softmax(int64_t count) {
        double* max = v.data();
        double* others = beyond.data();
        std::fill_n(max, count, -std::numeric_limits<double>::infinity());
        std::fill_n(largest.data(), count, 0);
        std::fill_n(others, count, 0.0);
        for (int64_t c = 0; c < a.c; ++c) take_largest(row(x, c), c, count, max, largest.data());
        for (int64_t c = 0; c < a.c; ++c) {
            T* e = row(x, c);
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) e[i] = T(double(e[i]) - max[i]);
            math::map(e, count, [](auto d) { return math::exp(d); }, e);
            add_others(e, largest.data(), c, count, others);
        }
        for (int64_t i = 0; i < count; ++i) others[i] += max[i] - max[i];  // NaN where that is infinite
        for (int64_t c = 0; c < a.c; ++c) shares(row(x, c), largest.data(), others, c, count, row(q, c));
    }

    static FUSEDLOSS_LOOP void take_largest(const T* __restrict x, int64_t c, int64_t n,
                                            double* __restrict max, int64_t* __restrict largest) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const double value = double(x[i]);
            largest[i] = value > max[i] ? c : largest[i];
            max[i] = value > max[i] ? value : max[i];
        }
    }

    static FUSEDLOSS_LOOP void add_others(const T* __restrict e, const int64_t* __restrict largest, int64_t c,
                                          int64_t n, double* __restrict others) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) others[i] += largest[i] == c ? 0.0 : double(e[i]);
    }

    // The largest has exp(0) = 1.
    static FUSEDLOSS_LOOP void shares(T* __restrict e, const int64_t* __restrict largest,
                                      const double* __restrict others, int64_t c, int64_t n,
                                      T* __restrict rest) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const double total = others[i] + 1.0, own = double(e[i]);
            rest[i] = T((largest[i] == c ? others[i] : total - own) / total);
            e[i] = T(own / total);
        }
    }
};

}  // namespace fusedloss
