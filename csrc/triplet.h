// Triplet margin loss over p-norms of rows, with the gradients of all three inputs.
#pragma once
#include <algorithm>
#include <cmath>

#include "convert.h"
#include "math.h"
#include "parallel.h"

namespace fusedloss {

inline void* memory(const Matrix& m, int64_t i) { return at(m.data, m.dtype, i * m.row_stride); }

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

template <class T>
int64_t triplet(const TripletArgs& a) {
    const int64_t f = a.features;
    const int64_t per_block = std::max<int64_t>(1, 2048 / std::max<int64_t>(f, 1));
    const int64_t blocks = (a.rows + per_block - 1) / per_block;
    std::vector<double> sums(static_cast<size_t>(blocks));
    for (const Matrix& g : a.grad) advise_huge_pages(g.data, a.rows * f * size_of(g.dtype));

    parallel_ranges(
        blocks, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, per_block * f)),
        [&](int64_t begin, int64_t end) {
            Distance<T> to_positive(a.p, a.eps, f), to_negative(a.p, a.eps, f), swapped(a.p, a.eps, f);
            std::vector<T> rows[3];
            for (auto& row : rows) row.resize(size_t(f));
            std::vector<double> losses(static_cast<size_t>(per_block));
            const auto write = [&](int k, int64_t row, auto... terms) {
                const Matrix& grad = a.grad[k];
                if (!grad.data) return;
                const bool direct = grad.dtype == dtype_of<T> && grad.stride == 1;
                T* out = direct ? static_cast<T*>(memory(grad, row)) : rows[k].data();
                combine(out, terms..., f);
                if (!direct) store(memory(grad, row), grad.dtype, grad.stride, f, out);
            };
            const bool wanted = a.grad[0].data || a.grad[1].data || a.grad[2].data;
            for (int64_t b = begin; b < end; ++b) {
                const int64_t first = b * per_block, count = std::min(per_block, a.rows - first);
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t row = first + i;
                    const T* x[3];
                    for (int k = 0; k < 3; ++k)
                        x[k] = load<T>(memory(a.input[k], row), a.input[k].dtype, a.input[k].stride, f,
                                       rows[k].data());
                    const double near = to_positive(x[0], x[1]);
                    double far = to_negative(x[0], x[2]), other = 0, by_far = 1;
                    if (a.swap) {
                        other = swapped(x[1], x[2]);
                        // As torch.minimum: NaN passes on, a tie shares the derivative.
                        by_far = far < other ? 1 : other < far ? 0 : 0.5;
                        far = other < far || other != other ? other : far;
                    }
                    const double hinge = a.margin + near - far;
                    losses[size_t(i)] = hinge < 0 ? 0 : hinge;
                    if (a.loss.data) store_one(a.loss.data, a.loss.dtype, row, losses[size_t(i)]);
                    if (!wanted) continue;
                    double g = a.grad_scale;
                    if (a.incoming.data)
                        g *= load_one(a.incoming.data, a.incoming.dtype, row * a.incoming.row_stride);
                    if (hinge < 0) g = 0;
                    const T to_near = to_positive.factor(g), to_far = to_negative.factor(-g * by_far);
                    const T *near_slope = to_positive.slope(), *far_slope = to_negative.slope();
                    if (!a.swap) {
                        write(0, row, to_near, near_slope, to_far, far_slope);
                        write(1, row, -to_near, near_slope);
                        write(2, row, -to_far, far_slope);
                    } else {
                        const T to_other = swapped.factor(-g * (1 - by_far));
                        const T* other_slope = swapped.slope();
                        write(0, row, to_near, near_slope, to_far, far_slope);
                        write(1, row, -to_near, near_slope, to_other, other_slope);
                        write(2, row, -to_far, far_slope, -to_other, other_slope);
                    }
                }
                sums[size_t(b)] = ordered_sum(losses.data(), count);
            }
        });
    if (a.total.data) store_one(a.total.data, a.total.dtype, 0, total_sum(sums) / a.denominator);
    return -1;
}

}  // namespace fusedloss
