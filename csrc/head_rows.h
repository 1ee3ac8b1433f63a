// What each row of a head counts, and the results of all of them: for heads whose logits are one chunk.
#pragma once
#include "labels.h"
#include "softmax.h"

namespace fusedloss {

// What is known of the rows that count, in the words that the caller gave.
template <class Word>
struct HeadWords {
    Word* start;
    int64_t n;

    Word* label() const { return start; }
    Word* kept() const { return start + n; }
    auto* share() const { return doubles(2); }
    auto* scale() const { return doubles(3); }
    auto* loss() const { return doubles(4); }
    auto& divisor() const { return *doubles(head_words); }

private:
    auto* doubles(int64_t k) const {
        using Double = std::conditional_t<std::is_const_v<Word>, const double, double>;
        return reinterpret_cast<Double*>(start + k * n);
    }
};

// Returns the first position whose index is out of range; or `some` less how many rows count, where not all
// do.
inline int64_t head_rows(const HeadRowsArgs& a) {
    const auto value = [](const Array& of, int64_t i) {
        return of.data ? load_one(of.data, of.dtype, i) : 1.0;
    };
    const HeadWords<int64_t> rows{a.rows, a.n};
    int64_t count = 0;
    double sum = 0;
    for (int64_t n = 0; n < a.n; ++n) {
        int64_t y = 0;
        if (a.label.data) {
            y = load_index(a.label.data, a.label.dtype, n);
            if (is_wrong(y, a.ignore_index, a.classes)) return n;
            if (y == a.ignore_index) continue;
        }
        sum += value(a.weight, y);
        const double share = value(a.share, n);
        const double scale = a.sign * share * value(a.incoming, n * a.incoming_stride);
        if (share == 0 || scale == 0) continue;
        rows.label()[count] = y;
        rows.kept()[count] = n;
        rows.share()[count] = share;
        rows.scale()[count++] = scale;
    }
    const double divisor = rows.divisor() = a.divide ? sum : 1.0;
    for (int64_t k = 0; k < count; ++k) rows.scale()[k] /= divisor;
    return count == a.n ? int64_t(fine) : some - count;
}

// Of the rows that are kept: their sum, or each at its place, and 0 at the others'.
inline int64_t head_results(const HeadResultsArgs& a) {
    constexpr int64_t lanes = 16;
    const HeadWords<const int64_t> rows{a.rows, a.n};
    double sums[lanes] = {};
    if (!a.reduced && a.count < a.n)
        for (int64_t n = 0; n < a.n; ++n) store_one(a.out.data, a.out.dtype, n, 0.0);
    for (int64_t k = 0; k < a.count; ++k) {
        const double loss = a.sign * rows.loss()[k] * rows.share()[k];
        if (a.reduced)
            sums[k % lanes] += loss;
        else
            store_one(a.out.data, a.out.dtype, rows.kept()[k], loss);
    }
    if (a.reduced) store_one(a.out.data, a.out.dtype, 0, tree_sum(sums) / rows.divisor());
    return fine;
}

}  // namespace fusedloss
