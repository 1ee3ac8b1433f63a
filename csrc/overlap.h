// The losses of overlaps, from the sums of each class: Dice, Jaccard, Tversky, generalised.
#pragma once
#include <limits>
#include <vector>

#include "grid.h"
#include "parallel.h"

namespace fusedloss {

// Of each class: the sums of p t, of p (1 - t), of (1 - p) t and of t. None cancels.
struct Sums {
    double both = 0, wrong = 0, missed = 0, size = 0;

    Sums& operator+=(const Sums& s) {
        both += s.both, wrong += s.wrong, missed += s.missed, size += s.size;
        return *this;
    }
};

// What a place's p is multiplied by in the gradient: where t is 1, and where it is 0.
struct Slopes {
    double inside = 0, outside = 0;
};

// The overlap (both + nr) / (both + alpha wrong + beta missed + dr), whose loss is 1 minus it: (alpha wrong +
// beta missed + dr - nr) over the same, which has its digits near 0. The derivatives take each numerator
// where they need it: 1 minus a quotient would have no digits. Nothing over nothing is 0.
class Overlap {
public:
    explicit Overlap(const DiceArgs& args) : a(args) {}

    int64_t entries() const { return a.weighting ? 1 : a.c - a.first; }

    // The losses of one group, n-th of `groups`, from its sums by class; stores them and gives their sum.
    // `slopes` of all classes, for the gradient, may be null.
    double losses(int64_t n, int64_t groups, const Sums* sums, Slopes* slopes) const {
        if (slopes) std::fill_n(slopes, a.c, Slopes());
        const double share = a.by_overlap / (a.mean ? double(groups * entries()) : 1.0);
        return a.weighting ? together(n, share, sums, slopes) : each(n, share, sums, slopes);
    }

private:
    struct Ratio {
        double share, above, below;  // of the overlap, of the loss

        double loss() const { return below == 0 ? 0.0 : above / below; }
    };

    const DiceArgs& a;

    double class_weight(int64_t c) const {
        return a.weight.data ? load_one(a.weight.data, a.weight.dtype, c) : 1.0;
    }

    double arriving(int64_t n, int64_t k) const {
        if (!a.incoming.data) return 1.0;
        const int64_t at = n * a.incoming.stride[0] + k * a.incoming.stride[1];
        return load_one(a.incoming.data, a.incoming.dtype, at);
    }

    void keep(int64_t n, int64_t k, double loss) const {
        if (a.loss.data)
            store_one(a.loss.data, a.loss.dtype, n * a.loss.stride[0] + k * a.loss.stride[1], loss);
    }

    double each(int64_t n, double share, const Sums* sums, Slopes* slopes) const {
        double total = 0;
        for (int64_t c = a.first; c < a.c; ++c) {
            const Sums& s = sums[c];
            const double apart = a.alpha * s.wrong + a.beta * s.missed;
            const Ratio r{s.both + a.smooth_nr, apart + (a.smooth_dr - a.smooth_nr),
                          s.both + apart + a.smooth_dr};
            const double w = a.skip_absent && s.both + s.missed == 0 ? 0.0 : class_weight(c);
            const double loss = w == 0 ? 0.0 : w * r.loss();
            keep(n, c - a.first, loss);
            total += share * loss;
            if (slopes && w != 0) slopes[c] = derived(r, share * w * arriving(n, c - a.first));
        }
        return total;
    }

    double together(int64_t n, double share, const Sums* sums, Slopes* slopes) const {
        std::vector<double> w(static_cast<size_t>(a.c));
        double most = 0;
        for (int64_t c = a.first; c < a.c; ++c) {
            const double size = sums[c].size;
            w[size_t(c)] = a.weighting == 1 ? 1 / (size * size) : a.weighting == 2 ? 1 / size : 1.0;
            if (w[size_t(c)] < std::numeric_limits<double>::infinity() && w[size_t(c)] > most)
                most = w[size_t(c)];
        }
        Ratio r{a.smooth_nr, a.smooth_dr - a.smooth_nr, a.smooth_dr};
        for (int64_t c = a.first; c < a.c; ++c) {
            double& weight = w[size_t(c)];
            weight = (weight == std::numeric_limits<double>::infinity() ? most : weight) * class_weight(c);
            const double apart = a.alpha * sums[c].wrong + a.beta * sums[c].missed;
            r.share += weight * sums[c].both;
            r.above += weight * apart;
            r.below += weight * (sums[c].both + apart);
        }
        keep(n, 0, r.loss());
        for (int64_t c = a.first; slopes && c < a.c; ++c)
            slopes[c] = derived(r, share * w[size_t(c)] * arriving(n, 0));
        return share * r.loss();
    }

    Slopes derived(const Ratio& r, double g) const {
        if (r.below == 0) return {};
        const double by_both = -r.above / r.below / r.below, by_apart = r.share / r.below / r.below;
        return {g * (by_both - a.beta * by_apart), g * a.alpha * by_apart};
    }
};

}  // namespace fusedloss
