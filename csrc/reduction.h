// Losses of rows: what is measured along a row, then a printed formula of these measures, with the gradients
// of all operands.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#include "convert.h"
#include "math.h"
#include "parallel.h"

namespace fusedloss {

constexpr int max_operands = 3;
constexpr int max_measures = 3;

// What sums along a row have, all computed in double; distances have neither.
template <class T>
struct Along {
    void (*map)(const T* const* x, int64_t n, const double* numbers, double* sums);
    void (*slope)(const T* const* x, int64_t n, const double* numbers, const double* by, T* const* out);
};

// A loss of rows.
struct Reduction {
    const char* name;
    int operands, measures;
    bool label;
    // The loss of a row, and where `by` is not null its derivatives by the measures.
    double (*project)(const double* measures, double label, const double* numbers, double* by);
    // Of double, and of float that they widen and round themselves.
    Along<double> in_double;
    Along<float> in_float;
};

inline void* row_of(const Matrix& m, int64_t i) { return at(m.data, m.dtype, i * m.row_stride); }

// Asks for a row of a gradient, which is written once the row is measured.
inline void fetch_to_write(const Matrix& m, int64_t row, int64_t n) {
    if (!m.data || m.stride != 1) return;
    const auto* from = static_cast<const char*>(row_of(m, row));
    for (int64_t i = 0; i < n * size_of(m.dtype); i += 64) __builtin_prefetch(from + i, 1);
}

// out = f v + g w
template <class T>
FUSEDLOSS_LOOP void combine(T* __restrict out, T f, const T* __restrict v, T g, const T* __restrict w,
                            int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = f * v[i] + g * w[i];
}

template <class T>
FUSEDLOSS_LOOP void combine(T* __restrict out, T f, const T* __restrict v, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = f * v[i];
}

// v = a - b + eps; returns the sum of its squares.
template <class T>
FUSEDLOSS_LOOP double subtract(const T* __restrict a, const T* __restrict b, T eps, int64_t n,
                               T* __restrict v) {
    constexpr int64_t width = 16;
    double sums[width] = {};
    const int64_t whole = n - n % width;
    for (int64_t i = 0; i < whole; i += width) {
        __builtin_prefetch(a + i + n);
        __builtin_prefetch(b + i + n);
        for (int64_t j = 0; j < width; ++j) {
            v[i + j] = a[i + j] - b[i + j] + eps;
            sums[j] += double(v[i + j]) * double(v[i + j]);
        }
    }
    for (int64_t i = whole; i < n; ++i) {
        v[i] = a[i] - b[i] + eps;
        sums[i - whole] += double(v[i]) * double(v[i]);
    }
    return tree_sum(sums);
}

// |a - b + eps|_p of one pair of rows, and its derivative by the difference.
template <class T>
class Distance {
public:
    Distance(double p, double eps, int64_t n) : p_(p), eps_(T(eps)), difference_(size_t(n)), n_(n) {}

    double operator()(const T* __restrict a, const T* __restrict b) {
        return value_ = norm(subtract(a, b, eps_, n_, difference_.data()));
    }

    // The derivative is this factor times `slope()`; 0 at distance 0. Called once for a pair.
    T factor(double scale) {
        if (scale == 0 || value_ == 0) {
            std::fill(difference_.begin(), difference_.end(), T(0));
            return T(0);
        }
        if (p_ == 2.0) return T(scale / value_);
        if (p_ == 1.0) {
            apply([](T x) { return sign(x); });
        } else if (std::isinf(p_)) {
            // The largest coordinates share the derivative evenly.
            int64_t ties = 0;
            for (T x : difference_) ties += double(math::abs(x)) == value_;
            scale /= double(ties);
            apply([&](T x) { return double(math::abs(x)) == value_ ? sign(x) : x != x ? x : T(0); });
        } else {
            // Of the ratio to the distance, so that no power leaves the range; 0 where a coordinate is.
            apply([&](T x) {
                const double ratio = std::abs(double(x)) / value_;
                return ratio == 0 ? T(0) : T(math::pow(ratio, p_ - 1)) * sign(x);
            });
        }
        return T(scale);
    }

    const T* slope() const { return difference_.data(); }

private:
    double p_;
    T eps_;
    std::vector<T> difference_;
    int64_t n_;
    double value_ = 0;

    static T sign(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : x; }

    template <class F>
    void apply(F&& slope) {
        for (T& x : difference_) x = slope(x);
    }

    double norm(double sum_of_squares) const {
        constexpr int64_t size = 256;
        const T* __restrict v = difference_.data();
        double terms[size], total = 0, largest = 0;
        if (p_ == 2.0) {
            const bool in_range = std::isfinite(sum_of_squares) && sum_of_squares > 0x1p-960;
            if (in_range || sum_of_squares == 0) return std::sqrt(sum_of_squares);
        }
        for (int64_t i = 0; i < n_; ++i) {
            const double x = std::abs(double(v[i]));
            largest = x > largest || x != x ? x : largest;
        }
        if (std::isinf(p_) || largest == 0 || !std::isfinite(largest)) return largest;
        if (p_ == 2.0) return largest * std::sqrt(squares(v, 1 / largest));
        total = 0;
        for (int64_t c = 0; c < n_; c += size) {
            const int64_t count = std::min(size, n_ - c);
            if (p_ == 1.0) {
                for (int64_t i = 0; i < count; ++i) terms[i] = std::abs(double(v[c + i]));
            } else {
#pragma omp simd
                for (int64_t i = 0; i < count; ++i)
                    terms[i] = math::pow(math::abs(double(v[c + i])) / largest, p_);
            }
            total += ordered_sum(terms, count);
        }
        return p_ == 1.0 ? total : largest * math::pow(total, 1 / p_);
    }

    double squares(const T* __restrict v, double scale) const {
        constexpr int width = 16;
        double sums[width] = {};
        const int64_t whole = n_ - n_ % width;
        for (int64_t i = 0; i < whole; i += width)
            for (int j = 0; j < width; ++j) {
                const double x = double(v[i + j]) * scale;
                sums[j] += x * x;
            }
        for (int64_t i = whole; i < n_; ++i) {
            const double x = double(v[i]) * scale;
            sums[i - whole] += x * x;
        }
        return ordered_sum(sums, width);
    }
};

// The p-norms of differences of two operands; p and eps are the first numbers.
template <class T>
class Distances {
public:
    static constexpr bool slow = false;
    Distances(const Reduction& reduction, const double* numbers, int64_t n) : n_(n) {
        norms_.reserve(max_measures);
        for (int k = 0; k < reduction.measures; ++k) norms_.emplace_back(numbers[0], numbers[1], n);
    }

    void measure(const T* const* x, double* out) {
        for (size_t k = 0; k < norms_.size(); ++k) out[k] = norms_[k](x[pairs[k][0]], x[pairs[k][1]]);
    }

    // The derivatives of the loss by the measures; called once for a row.
    void arrive(const T* const*, const double* by) {
        for (size_t k = 0; k < norms_.size(); ++k) factors_[k] = norms_[k].factor(by[k]);
    }

    // The gradient of an operand, where it is: in `out`. No two pairs are alike: it stands in two at most.
    const T* gradient(int operand, T* out) const {
        const T *v[2], zero = 0;
        T f[2] = {zero, zero};
        int found = 0;
        for (size_t k = 0; k < norms_.size(); ++k) {
            if (pairs[k][0] != operand && pairs[k][1] != operand) continue;
            v[found] = norms_[k].slope();
            f[found++] = pairs[k][0] == operand ? factors_[k] : -factors_[k];
        }
        if (found == 2)
            combine(out, f[0], v[0], f[1], v[1], n_);
        else
            combine(out, f[0], v[0], n_);
        return out;
    }

private:
    static constexpr int pairs[max_measures][2] = {{0, 1}, {0, 2}, {1, 2}};
    std::vector<Distance<T>> norms_;
    T factors_[max_measures];
    int64_t n_;
};

// Sums of what a printed map gives for each place of a row.
template <class T>
class Sums {
public:
    static constexpr bool slow = true;  // so that memory waits for it

    Sums(const Reduction& reduction, const double* numbers, int64_t n)
        : reduction_(reduction), numbers_(numbers), n_(n), slopes_(size_t(reduction.operands * n)) {}

    void measure(const T* const* x, double* out) const { along().map(x, n_, numbers_, out); }

    void arrive(const T* const* x, const double* by) {
        T* out[max_operands];
        for (int k = 0; k < reduction_.operands; ++k) out[k] = slopes_.data() + k * n_;
        const auto nothing = [](double d) { return d == 0; };
        if (std::all_of(by, by + reduction_.measures, nothing))
            return std::fill(slopes_.begin(), slopes_.end(), T(0));
        along().slope(x, n_, numbers_, by, out);
    }

    const T* gradient(int operand, T*) const { return slopes_.data() + operand * n_; }

private:
    const Reduction& reduction_;
    const double* numbers_;
    int64_t n_;
    std::vector<T> slopes_;

    const Along<T>& along() const {
        if constexpr (sizeof(T) == 4)
            return reduction_.in_float;
        else
            return reduction_.in_double;
    }
};

template <class T, class Measure>
int64_t reduce_rows(const ReductionArgs& a, const Reduction& reduction) {
    const int64_t f = a.features;
    const int64_t per_block = std::max<int64_t>(1, 2048 / std::max<int64_t>(f, 1));
    const int64_t blocks = (a.rows + per_block - 1) / per_block;
    std::vector<double> sums(static_cast<size_t>(blocks));
    bool wanted = false;
    for (const Matrix& g : a.grad) {
        advise_huge_pages(g.data, a.rows * f * size_of(g.dtype));
        wanted |= g.data != nullptr;
    }

    parallel_ranges(
        blocks, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, per_block * f)),
        [&](int64_t begin, int64_t end) {
            Measure along(reduction, a.numbers, f);
            std::vector<T> rows[max_operands];
            for (int k = 0; k < reduction.operands; ++k) rows[k].resize(size_t(f));
            std::vector<double> losses(static_cast<size_t>(per_block));
            const auto loss_of = [&](int64_t row) {
                const T* x[max_operands];
                for (int k = 0; k < reduction.operands; ++k) {
                    const Matrix& m = a.input[k];
                    x[k] = load<T>(row_of(m, row), m.dtype, m.stride, f, rows[k].data());
                }
                double measures[max_measures], by[max_measures];
                if constexpr (Measure::slow)
                    for (const Matrix& grad : a.grad) fetch_to_write(grad, row, f);
                along.measure(x, measures);
                const Matrix& label = a.input[reduction.operands % max_operands];
                const double own = reduction.label ? load_one(row_of(label, row), label.dtype, 0) : 0;
                const double loss = reduction.project(measures, own, a.numbers, wanted ? by : nullptr);
                if (a.loss.data) store_one(a.loss.data, a.loss.dtype, row, loss);
                if (!wanted) return loss;
                double g = a.grad_scale;
                if (a.incoming.data) g *= load_one(row_of(a.incoming, row), a.incoming.dtype, 0);
                // What a loss does not depend on stops even what is infinite.
                for (int k = 0; k < reduction.measures; ++k) by[k] = by[k] == 0 ? 0 : g * by[k];
                along.arrive(x, by);
                for (int k = 0; k < reduction.operands; ++k) {
                    const Matrix& grad = a.grad[k];
                    if (!grad.data) continue;
                    const bool direct = grad.dtype == dtype_of<T> && grad.stride == 1;
                    void* to = row_of(grad, row);
                    const T* from = along.gradient(k, direct ? static_cast<T*>(to) : rows[k].data());
                    if (from != to) store(to, grad.dtype, grad.stride, f, from);
                }
                return loss;
            };
            for (int64_t b = begin; b < end; ++b) {
                const int64_t first = b * per_block, count = std::min(per_block, a.rows - first);
                for (int64_t i = 0; i < count; ++i) losses[size_t(i)] = loss_of(first + i);
                sums[size_t(b)] = ordered_sum(losses.data(), count);
            }
        });
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / a.denominator);
    return fine;
}

// The functions of a printed definition F.
template <class F, size_t... k>
double project(const double* measures, [[maybe_unused]] double label, const double* numbers, double* by,
               std::index_sequence<k...>) {
    const F f(numbers);
    if constexpr (F::label) {
        if (by) f.grad(measures[k]..., label, by[k]...);
        return f.value(measures[k]..., label);
    } else {
        if (by) f.grad(measures[k]..., by[k]...);
        return f.value(measures[k]...);
    }
}

template <class F, class T, size_t... i, size_t... k>
FUSEDLOSS_LOOP void map_sums(const T* const* x, int64_t n, const double* numbers, double* out,
                             std::index_sequence<i...>, std::index_sequence<k...>) {
    const F f(numbers);
    constexpr int64_t width = 8;
    double sums[F::measures][width] = {};
    const auto add = [&](int64_t at, int64_t j) {
        double terms[F::measures];
        f.map(double(x[i][at])..., terms[k]...);
        ((sums[k][j] += terms[k]), ...);
    };
    const int64_t whole = n - n % width;
    for (int64_t at = 0; at < whole; at += width) {
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) add(at + j, j);
    }
    for (int64_t at = whole; at < n; ++at) add(at, at - whole);
    ((out[k] = tree_sum(sums[k])), ...);
}

template <class F, class T, size_t... i, size_t... k>
FUSEDLOSS_LOOP void slopes_along(const T* const* x, int64_t n, const double* numbers, const double* by,
                                 T* const* out, std::index_sequence<i...>, std::index_sequence<k...>) {
    const F f(numbers);
#pragma omp simd
    for (int64_t at = 0; at < n; ++at) {
        double slopes[F::operands];
        f.slope(double(x[i][at])..., by[k]..., slopes[i]...);
        ((out[i][at] = T(slopes[i])), ...);
    }
}

template <class F, class T>
constexpr Along<T> along() {
    using Operands = std::make_index_sequence<F::operands>;
    using Measures = std::make_index_sequence<F::measures>;
    return {[](const T* const* x, int64_t n, const double* numbers, double* sums) {
                map_sums<F>(x, n, numbers, sums, Operands(), Measures());
            },
            [](const T* const* x, int64_t n, const double* numbers, const double* by, T* const* out) {
                slopes_along<F>(x, n, numbers, by, out, Operands(), Measures());
            }};
}

template <class F>
constexpr Reduction reduction_of(const char* name) {
    using Measures = std::make_index_sequence<F::measures>;
    Reduction found{name, F::operands, F::measures, F::label, nullptr, {}, {}};
    found.project = [](const double* measures, double label, const double* numbers, double* by) {
        return project<F>(measures, label, numbers, by, Measures());
    };
    if constexpr (!F::distances) {
        found.in_double = along<F, double>();
        found.in_float = along<F, float>();
    }
    return found;
}

inline int64_t reduce(const ReductionArgs& a, const Reduction& reduction) {
    bool wide = false, narrow = true;
    for (int k = 0; k < reduction.operands; ++k) {
        wide |= a.input[k].dtype == F64;
        narrow &= a.input[k].dtype == F32 && (!a.grad[k].data || a.grad[k].dtype == F32);
    }
    if (reduction.in_double.map)  // half types are rounded once
        return narrow ? reduce_rows<float, Sums<float>>(a, reduction)
                      : reduce_rows<double, Sums<double>>(a, reduction);
    return wide ? reduce_rows<double, Distances<double>>(a, reduction)
                : reduce_rows<float, Distances<float>>(a, reduction);
}

}  // namespace fusedloss
