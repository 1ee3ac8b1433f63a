// The passes of an overlap over what is no softmax against class indices.
#pragma once
#include "labels.h"
#include "overlap.h"

namespace fusedloss {

// What is read of a tile, `rows` classes at a time, and what is made of a class's probabilities and target.
template <class T>
class MaskTile {
protected:
    static constexpr int64_t group = 64;
    const DiceArgs& a;
    const int64_t width;
    std::vector<T> x, q, t;  // probabilities, 1 - these, and the target
    std::vector<int64_t> y;

    MaskTile(const DiceArgs& args, int64_t rows, int64_t lanes)
        : a(args), width(lanes), x(size_t(rows * width)), q(x.size()), t(x.size()), y(size_t(width)) {}

    // What the first-level cache holds of three numbers an element.
    static int64_t lanes_of(int64_t rows) {
        return std::clamp<int64_t>(2048 / std::max<int64_t>(rows, 1) / group * group, group, 8 * group);
    }

    T* row(std::vector<T>& of, int64_t k) { return of.data() + k * width; }
    // What the target is where it does not count.
    T ignored() const { return a.masks ? T(a.ignore_index) : T(-1); }

    void read_labels(int64_t n, int64_t d0, int64_t count) {
        if (!a.masks)
            load_indices(a.target.data, a.target.dtype, row_start(a.target, n, d0), a.target.stride[2], count,
                         y.data());
    }

    // Class c, as the k-th that is here.
    void read_class(int64_t n, int64_t d0, int64_t count, int64_t c, int64_t k) {
        const int64_t from = row_start(a.input, n, d0) + c * a.input.stride[1];
        load_strided(memory(a.input, from), a.input.dtype, a.input.stride[2], count, row(x, k));
        read_target(n, d0, count, c, k);
    }

    void store_class(int64_t n, int64_t d0, int64_t count, int64_t c, int64_t k) {
        const int64_t to = row_start(a.grad, n, d0) + c * a.grad.stride[1];
        store(memory(a.grad, to), a.grad.dtype, a.grad.stride[2], count, row(t, k));
    }

    Sums sums_of(int64_t k, int64_t count) {
        return sums_of(row(x, k), row(q, k), row(t, k), ignored(), count);
    }

    void weigh(const Slopes& s, int64_t k, int64_t count) { weigh(s, row(t, k), ignored(), count); }

    static double slope_of(T t, double inside, double outside) {
        const double some = double(t);
        return some * inside + (1 - some) * outside;
    }

private:
    void read_target(int64_t n, int64_t d0, int64_t count, int64_t c, int64_t k) {
        T* to = row(t, k);
        if (!a.masks) {
            for (int64_t i = 0; i < count; ++i) {
                const bool counts = y[size_t(i)] != a.ignore_index;
                to[i] = counts ? T(y[size_t(i)] == c) : ignored();
                row(x, k)[i] = counts ? row(x, k)[i] : T(0);  // which may be NaN
            }
            return;
        }
        const int64_t from = row_start(a.target, n, d0) + c * a.target.stride[1];
        if (a.target.dtype < I64)
            return load_strided(memory(a.target, from), a.target.dtype, a.target.stride[2], count, to);
        load_indices(a.target.data, a.target.dtype, from, a.target.stride[2], count, y.data());
        for (int64_t i = 0; i < count; ++i) to[i] = T(y[size_t(i)]);
    }

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
        for (int64_t i = 0; i < n; ++i) t[i] = t[i] != ignored ? T(slope_of(t[i], inside, outside)) : T(0);
    }
};

// Sigmoids and probabilities, one class after the other.
template <class T>
class Apart : MaskTile<T> {
    using Base = MaskTile<T>;
    using Base::a, Base::x, Base::q, Base::t, Base::row;

public:
    Apart(const DiceArgs& args, const Rows<T>&) : Base(args, 1, lanes(args)) {}

    static int64_t lanes(const DiceArgs&) { return 8 * Base::group; }

    double sums(int64_t n, int64_t d0, int64_t count, Sums* of) {
        this->read_labels(n, d0, count);
        for (int64_t c = 0; c < a.c; ++c) {
            this->read_class(n, d0, count, c, 0);
            activate(count);
            of[c] += this->sums_of(0, count);
        }
        return 0;
    }

    void gradient(int64_t n, int64_t d0, int64_t count, const Slopes* slopes, double) {
        this->read_labels(n, d0, count);
        for (int64_t c = 0; c < a.c; ++c) {
            this->read_class(n, d0, count, c, 0);
            if (a.activation == 1)
                sigmoid_slopes(slopes[c], exps(count), row(t, 0), this->ignored(), count);
            else
                this->weigh(slopes[c], 0, count);
            this->store_class(n, d0, count, c, 0);
        }
    }

private:
    void activate(int64_t count) {
        if (a.activation == 1) {
            exps(count);
            sigmoids(row(x, 0), row(q, 0), count);
        } else {
            for (int64_t i = 0; i < count; ++i) row(q, 0)[i] = T(1) - row(x, 0)[i];
        }
    }

    const T* exps(int64_t count) {
        math::map(row(q, 0), count, [](auto logit) { return math::exp_minus_abs(logit); }, row(x, 0));
        return row(q, 0);
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
            const double slope = Base::slope_of(t[i], inside, outside), less = part(e[i]);
            t[i] = t[i] != ignored ? T(slope * (less * (1 - less))) : T(0);
        }
    }
};

// Softmax against masks, all classes of a place together: their slopes cancel, thus in double.
class Together : MaskTile<double> {
public:
    Together(const DiceArgs& args, const Rows<double>&)
        : MaskTile(args, args.c, lanes(args)), largest(y.size()), v(y.size()), beyond(y.size()) {}

    static int64_t lanes(const DiceArgs& args) { return lanes_of(args.c); }

    double sums(int64_t n, int64_t d0, int64_t count, Sums* of) {
        read(n, d0, count);
        for (int64_t c = 0; c < a.c; ++c) of[c] += sums_of(c, count);
        return 0;
    }

    void gradient(int64_t n, int64_t d0, int64_t count, const Slopes* slopes, double) {
        read(n, d0, count);
        for (int64_t c = 0; c < a.c; ++c) weigh(slopes[c], c, count);
        softmax_slopes(count);
        for (int64_t c = 0; c < a.c; ++c) store_class(n, d0, count, c, c);
    }

private:
    std::vector<int64_t> largest;  // classes
    std::vector<double> v, beyond;

    void read(int64_t n, int64_t d0, int64_t count) {
        read_labels(n, d0, count);
        for (int64_t c = 0; c < a.c; ++c) read_class(n, d0, count, c, c);
        softmax(count);
    }

    // p (v - S), with v - S of the largest class as the others' part of it, and of these from there.
    void softmax_slopes(int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t top = largest[size_t(i)];
            v[size_t(i)] = row(t, top)[i];
            beyond[size_t(i)] = row(q, top)[i] * v[size_t(i)];
        }
        for (int64_t c = 0; c < a.c; ++c)
            take_others(row(x, c), row(t, c), largest.data(), c, count, beyond.data());
        for (int64_t c = 0; c < a.c; ++c) slopes_of(row(x, c), v.data(), beyond.data(), count, row(t, c));
    }

    static FUSEDLOSS_LOOP void take_others(const double* __restrict p, const double* __restrict v,
                                           const int64_t* __restrict largest, int64_t c, int64_t n,
                                           double* __restrict beyond) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) beyond[i] -= largest[i] == c ? 0.0 : p[i] * v[i];
    }

    static FUSEDLOSS_LOOP void slopes_of(const double* __restrict p, const double* __restrict of_largest,
                                         const double* __restrict beyond, int64_t n, double* __restrict v) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) v[i] = p[i] * ((v[i] - of_largest[i]) + beyond[i]);
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
            math::map(
                row(x, c), count, [](auto x, auto most) { return math::exp(x - most); }, row(x, c), max);
            add_others(row(x, c), largest.data(), c, count, others);
        }
        for (int64_t i = 0; i < count; ++i) others[i] += max[i] - max[i];  // NaN where that is infinite
        for (int64_t c = 0; c < a.c; ++c) shares(row(x, c), largest.data(), others, c, count, row(q, c));
    }

    static FUSEDLOSS_LOOP void take_largest(const double* __restrict x, int64_t c, int64_t n,
                                            double* __restrict max, int64_t* __restrict largest) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            largest[i] = x[i] > max[i] ? c : largest[i];
            max[i] = x[i] > max[i] ? x[i] : max[i];
        }
    }

    static FUSEDLOSS_LOOP void add_others(const double* __restrict e, const int64_t* __restrict largest,
                                          int64_t c, int64_t n, double* __restrict others) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) others[i] += largest[i] == c ? 0.0 : e[i];
    }

    // The largest has exp(0) = 1.
    static FUSEDLOSS_LOOP void shares(double* __restrict e, const int64_t* __restrict largest,
                                      const double* __restrict others, int64_t c, int64_t n,
                                      double* __restrict rest) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const double total = others[i] + 1.0;
            rest[i] = (largest[i] == c ? others[i] : total - e[i]) / total;
            e[i] /= total;
        }
    }
};

}  // namespace fusedloss
