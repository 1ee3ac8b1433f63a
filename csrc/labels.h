// The class indices of a target: which count, whether they are in range, and what the mean divides by.
#pragma once
#include <vector>

#include "grid.h"
#include "parallel.h"

namespace fusedloss {

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

    // The mean is over so many, if nothing else is given.
    void divide(double count) {
        if (a.mean) denominator = a.denominator != 0 ? a.denominator : count;
    }

    // Returns -1, or the first position whose index is out of range; sets the mean's denominator.
    int64_t check() {
        constexpr int64_t size = 4096, strip = 1024;
        const int64_t blocks = (positions() + size - 1) / size;
        std::vector<double> sums(static_cast<size_t>(blocks));
        FirstWrong outside;
        parallel(blocks, 4, [&](int64_t b) {
            int64_t y[strip];
            double sum = 0;
            const auto look = [&](int64_t i, int64_t n, int64_t d, int64_t count) {
                labels(n, d, count, y);
                bool bad = false;
                const int64_t valid = counted(y, count, a.ignore_index, a.c, bad);
                if (bad) {
                    const auto wrong = [&](int64_t label) { return is_wrong(label, a.ignore_index, a.c); };
                    outside.note(i + (std::find_if(y, y + count, wrong) - y));
                    return;
                }
                if (!weight) sum += double(valid);
                for (int64_t k = 0; weight && k < count; ++k)
                    if (y[k] != a.ignore_index) sum += double(weight[y[k]]);
            };
            for (int64_t first = 0; first < size; first += strip) runs(b * size + first, strip, look);
            sums[size_t(b)] = sum;
        });
        if (outside.position() >= 0) return outside.position();
        divide(total_sum(sums));
        return -1;
    }

    double incoming(int64_t n, int64_t d) const {
        const double g =
            a.incoming.data ? load_one(a.incoming.data, a.incoming.dtype, row_start(a.incoming, n, d)) : 1.0;
        return a.mean ? g / denominator : g;
    }
};

}  // namespace fusedloss
