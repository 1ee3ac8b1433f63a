// Triplet margin loss over p-norms of rows, with the gradients of all three inputs.
#pragma once
#include <algorithm>
#include <cmath>

#include "convert.h"
#include "math.h"
#include "parallel.h"

namespace fusedloss {

// Rows of features. Null data means absent.
struct Matrix {
    void* data;
    int64_t dtype;
    int64_t row_stride, stride;

    void* row(int64_t i) const { return at(data, dtype, i * row_stride); }
};

// Packed by cpu/triplet.py; the field order is shared with it.
struct TripletArgs {
    int64_t rows, features;
    int64_t swap;
    double margin, p, eps;
    double denominator, grad_scale;
    Matrix input[3];  // anchor, positive, negative
    Matrix incoming;  // a gradient for each row
    Matrix loss;      // unreduced
    Matrix total;
    Matrix grad[3];
};

// |a - b + eps|_p of one pair of rows, and its derivative by the difference.
template <class T>
class Distance {
public:
    Distance(double p, double eps, int64_t n) : p_(p), eps_(T(eps)), difference_(size_t(n)), n_(n) {}

    double operator()(const T* __restrict a, const T* __restrict b) {
        T* __restrict v = difference_.data();
#pragma omp simd
        for (int64_t i = 0; i < n_; ++i) v[i] = a[i] - b[i] + eps_;
        return value_ = norm(v);
    }

    // Adds `scale` times the derivative to `plus` and takes it from `minus`; 0 at distance 0.
    void add_slope(double scale, T* __restrict plus, T* __restrict minus) const {
        if (scale == 0 || value_ == 0) return;
        const T* __restrict v = difference_.data();
        if (p_ == 2.0) {
            const T s = T(scale / value_);
#pragma omp simd
            for (int64_t i = 0; i < n_; ++i) {
                plus[i] += s * v[i];
                minus[i] -= s * v[i];
            }
        } else if (p_ == 1.0) {
            apply([&](T x) { return T(scale) * sign(x); }, plus, minus);
        } else if (std::isinf(p_)) {
            // The largest coordinates share the derivative evenly.
            int64_t ties = 0;
            for (int64_t i = 0; i < n_; ++i) ties += double(math::abs(v[i])) == value_;
            const T share = T(scale / double(ties));
            apply([&](T x) { return double(math::abs(x)) == value_ ? share * sign(x)
                                    : x != x                       ? x
                                                                   : T(0); },
                  plus, minus);
        } else {
            // Of the ratio to the distance, so that no power leaves the range; 0 where a coordinate is.
            apply(
                [&](T x) {
                    const double ratio = std::abs(double(x)) / value_;
                    return ratio == 0 ? T(0) : T(scale * math::pow(ratio, p_ - 1)) * sign(x);
                },
                plus, minus);
        }
    }

private:
    double p_;
    T eps_;
    std::vector<T> difference_;
    int64_t n_;
    double value_ = 0;

    static T sign(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : x; }

    template <class F>
    void apply(F&& slope, T* __restrict plus, T* __restrict minus) const {
        for (int64_t i = 0; i < n_; ++i) {
            const T s = slope(difference_[size_t(i)]);
            plus[i] += s;
            minus[i] -= s;
        }
    }

    double norm(const T* __restrict v) const {
        constexpr int64_t size = 256;
        double terms[size], total = 0, largest = 0;
        if (p_ == 2.0) {
            total = squares(v, 1.0);
            if (std::isfinite(total) && (total > 0x1p-960 || total == 0)) return std::sqrt(total);
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
            std::vector<T> rows[3], slopes[3];
            for (int k = 0; k < 3; ++k) {
                rows[k].resize(size_t(f));
                slopes[k].resize(size_t(f));
            }
            std::vector<double> losses(static_cast<size_t>(per_block));
            const bool wanted = a.grad[0].data || a.grad[1].data || a.grad[2].data;
            for (int64_t b = begin; b < end; ++b) {
                const int64_t first = b * per_block, count = std::min(per_block, a.rows - first);
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t row = first + i;
                    const T* x[3];
                    for (int k = 0; k < 3; ++k)
                        x[k] = load<T>(a.input[k].row(row), a.input[k].dtype, a.input[k].stride, f,
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
                    for (auto& s : slopes) std::fill(s.begin(), s.end(), T(0));
                    if (!(hinge < 0)) {
                        to_positive.add_slope(g, slopes[0].data(), slopes[1].data());
                        to_negative.add_slope(-g * by_far, slopes[0].data(), slopes[2].data());
                        if (a.swap) swapped.add_slope(-g * (1 - by_far), slopes[1].data(), slopes[2].data());
                    }
                    for (int k = 0; k < 3; ++k)
                        if (a.grad[k].data)
                            store(a.grad[k].row(row), a.grad[k].dtype, a.grad[k].stride, f, slopes[k].data());
                }
                sums[size_t(b)] = ordered_sum(losses.data(), count);
            }
        });
    if (a.total.data)
        store_one(a.total.data, a.total.dtype, 0, ordered_sum(sums.data(), blocks) / a.denominator);
    return -1;
}

}  // namespace fusedloss
