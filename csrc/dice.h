// Losses of the overlap of classes with their masks: one pass for the sums, one for the gradient.
//
// With p the probabilities, t the one-hot target and L the loss, dL/dp is one number of each class where t is
// 1 and another where it is 0 (see overlap.h); softmax and sigmoid take it from there. Cross entropy or the
// focal loss may be added: it reads the logits with the first pass, and its gradient is written with the
// second.
#pragma once
#include <memory>

#include "cross_entropy_tiles.h"
#include "dice_masks.h"

namespace fusedloss {

// e becomes e f, in `out` too; gives its sum, of terms of one sign: see quick_sum. n is a multiple of 16.
template <class T>
FUSEDLOSS_LOOP double scale_and_sum(T* e, const T* __restrict f, int64_t n, T* out, const T* next) {
    constexpr int64_t lanes = 16, line = 64 / sizeof(T);
    double sums[lanes] = {};
    T u[4 * lanes];
    for (int64_t i = 0; i < n; i += 4 * lanes) {
        const int64_t count = std::min<int64_t>(4 * lanes, n - i);
        for (int64_t j = 0; j < count; j += line) __builtin_prefetch(next + i + j, 1);
        if (count == 4 * lanes) {
#pragma omp simd
            for (int64_t j = 0; j < 4 * lanes; ++j) out[i + j] = u[j] = e[i + j] * f[i + j];
        } else {
            std::fill_n(u, 4 * lanes, T(0));
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) out[i + j] = u[j] = e[i + j] * f[i + j];
        }
        add_group(u, sums);
    }
    return tree_sum(sums);
}

// A probability of more than half becomes 0, and its class is told.
template <class T, class Index>
inline void take_apart(T& p, Index c, Index& largest) {
    largest = p > T(0.5) ? c : largest;
    p = p > T(0.5) ? T(0) : p;
}

// Adds four classes, from c on and `width` apart, to `all`, and with a factor each to `some`; a class with
// more than half of the probability is set apart, and told in `largest`.
template <class T, class Index>
FUSEDLOSS_LOOP void add_four_twice(double* __restrict all, double* __restrict some, Index* __restrict largest,
                                   const T* __restrict p, const T* __restrict by, Index c, int64_t width,
                                   int64_t n) {
    const T* __restrict p1 = p + width, * __restrict p2 = p1 + width, * __restrict p3 = p2 + width;
    const T b0 = by[0], b1 = by[1], b2 = by[2], b3 = by[3];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        T q = p[i], q1 = p1[i], q2 = p2[i], q3 = p3[i];
        Index found = largest[i];
        take_apart(q, c, found);
        take_apart(q1, c + 1, found);
        take_apart(q2, c + 2, found);
        take_apart(q3, c + 3, found);
        largest[i] = found;
        all[i] += double((q + q1) + (q2 + q3));
        some[i] += double((q * b0 + q1 * b1) + (q2 * b2 + q3 * b3));
    }
}

template <class T, class Index>
FUSEDLOSS_LOOP void add_twice(double* __restrict all, double* __restrict some, Index* __restrict largest,
                              const T* __restrict p, T by, Index c, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        T q = p[i];
        Index found = largest[i];
        take_apart(q, c, found);
        largest[i] = found;
        all[i] += double(q);
        some[i] += double(q * by);
    }
}

template <class T>
FUSEDLOSS_LOOP void copy_ahead(const T* __restrict from, int64_t n, T* __restrict to, const T* next) {
    each_ahead<T, false>(n, next, [=](int64_t i) { to[i] = from[i]; });
}

// A number as the sum of two of type T: what cancels in the first leaves the digits of the second.
template <class T>
struct Split {
    T high, low;

    explicit Split(double v) : high(T(v)), low(T(v - double(high))) {}
};

// p (b + h), with h as the sum of three, of which `more` may be null; `out` may be `p`.
template <class T>
FUSEDLOSS_LOOP void overlap_slope(const T* p, const T* high, const T* low, const T* more, Split<T> b,
                                  int64_t n, T* out, const T* next) {
    if (more)
        each_ahead<T, true>(
            n, next, [=](int64_t i) { out[i] = p[i] * ((b.high + high[i]) + ((b.low + low[i]) + more[i])); });
    else
        each_ahead<T, true>(n, next,
                            [=](int64_t i) { out[i] = p[i] * ((b.high + high[i]) + (b.low + low[i])); });
}

inline RowsArgs rows_of(const DiceArgs& a) {
    RowsArgs r{};
    r.n = a.n, r.c = a.c, r.d = a.d;
    r.mean = a.mean && a.by_rows != 0;
    r.ignore_index = a.ignore_index, r.gamma = a.gamma;
    r.input = a.input, r.target = a.target, r.grad = a.grad;
    if (a.by_rows != 0) r.weight = a.weight;
    return r;
}

// Softmax against class indices: the tiles of cross entropy. The probabilities wait in the gradient's own
// memory, where that has their type.
template <class T>
class Indices : TileKernel<T> {
    using Base = TileKernel<T>;
    using Base::at, Base::p, Base::a, Base::r, Base::width, Base::largest;
    using typename Base::Index;

public:
    static constexpr int64_t most = Base::most;

    Indices(const DiceArgs& args, const Rows<T>& rows)
        : Base(rows, lanes(args)), own_rows(args.by_rows != 0), outside(size_t(args.c)) {}

    static int64_t lanes(const DiceArgs& args) {
        return Base::lanes(args.c, args.d, args.input.stride[2] == 1);
    }

    // Adds to the sums of the classes; gives the sum of the rows' losses.
    double sums(int64_t n, int64_t d0, int64_t count, Sums* of) {
        const int64_t padded = (count + 15) / 16 * 16;
        gather(n, d0, count, padded);
        double of_rows = 0;
        if (own_rows) {
            position_losses<T, true, false>(p, padded, 1.0, losses);
            if (a.gamma != 0) focus(p, padded, a.gamma, losses);
            of_rows = ordered_sum(losses, count);
        }
        share(padded);
        const bool keep = kept(count, padded);
        for (int64_t c = 0; c < a.c; ++c) {
            T* to = keep ? this->stretch(a.grad, n, d0, c) : at(c);
            const T* next = keep ? this->after(a.grad, n, d0, c, count) : at(c);
            of[c].wrong += scale_and_sum(at(c), f, padded, to, next);
        }
        for (int64_t i = 0; i < count; ++i) {
            if (p.y[i] < 0) continue;
            of[p.y[i]].both += own[i];
            of[p.y[i]].missed += rest[i];
            of[p.y[i]].size += 1;
        }
        if (keep)
            set_own(
                p.y, count, [&](int64_t i) { return T(own[i]); }, this->stretch(a.grad, n, d0, 0),
                a.grad.stride[1]);
        return of_rows;
    }

    void gradient(int64_t n, int64_t d0, int64_t count, const Slopes* slopes, double by_rows) {
        const int64_t padded = (count + 15) / 16 * 16;
        if (kept(count, padded))
            take(n, d0, count, padded);
        else
            make(n, d0, count, padded);
        for (int64_t c = 0; c < a.c; ++c) outside[size_t(c)] = T(slopes[c].outside);
        std::fill_n(p.others, padded, 0.0);
        std::fill_n(p.dots, padded, 0.0);
        std::fill_n(largest, padded, Index(-1));
        const int64_t fours = a.c / 4 * 4;
        for (int64_t c = 0; c < fours; c += 4)
            add_four_twice(p.others, p.dots, largest, at(c), outside.data() + c, Index(c), width, padded);
        for (int64_t c = fours; c < a.c; ++c)
            add_twice(p.others, p.dots, largest, at(c), outside[size_t(c)], Index(c), padded);
        const int64_t apart = set_wrong_apart(count, padded, slopes);
        for (int64_t i = 0; i < padded; ++i) inside[i] = p.y[i] >= 0 ? slopes[p.y[i]].inside : 0.0;
        std::fill_n(losses, padded, 0.0);
        for (int64_t i = 0; i < padded && own_rows; ++i)
            losses[i] = p.y[i] >= 0 ? by_rows * r.class_weight(p.y[i]) : 0.0;
#pragma omp simd
        for (int64_t i = 0; i < padded; ++i) {
            // Of a wrong class that is near certain: v_k - S as the others' part of it.
            beyond[i] = (p.others[i] + own[i]) * wrong_slope[i] - (own[i] * inside[i] + p.dots[i]);
            p.others[i] += wrong[i];
        }
        if (a.gamma != 0) focus_rows(padded);
        for (int64_t i = 0; i < padded; ++i) {
            // losses - S, of which the others' part may be less than a rounding of the slope's.
            const double part = losses[i] + beyond[i];
            const Split<T> origin(wrong[i] > 0 ? -wrong_slope[i] : part);
            high[i] = origin.high, low[i] = origin.low;
            more[i] = wrong[i] > 0 ? T(part) : T(0);
            // p_y (v_y - S) as p_y ((1 - p_y) v_y - the others' part), likewise.
            const double v =
                wrong[i] > 0 ? (inside[i] - wrong_slope[i]) + beyond[i] : p.others[i] * inside[i] - p.dots[i];
            p.own[i] = T(own[i] * v - losses[i] * p.others[i]);
        }
        const bool direct = this->dense(a.grad) && padded == count;
        const auto to = [&](int64_t c) { return direct ? this->stretch(a.grad, n, d0, c) : at(c); };
        for (int64_t c = 0; c < a.c; ++c) {
            const T* next = direct ? this->after(a.grad, n, d0, c, count) : at(c);
            overlap_slope(at(c), high, low, apart ? more : nullptr, Split<T>(slopes[c].outside), padded,
                          to(c), next);
        }
        for (int64_t k = 0; k < apart; ++k) {
            const int64_t i = set_apart[k];
            to(largest[i])[i] = T(wrong[i] * (beyond[i] + losses[i]));
        }
        this->settle_gradient(n, d0, count, direct);
    }

private:
    const bool own_rows;
    std::vector<T> outside;
    alignas(64) T f[most], high[most], low[most], more[most];
    alignas(64) double own[most], rest[most], losses[most], inside[most];
    alignas(64) double wrong[most], wrong_slope[most], beyond[most];
    Index set_apart[most];

    bool kept(int64_t count, int64_t padded) const {
        return a.grad.data && this->dense(a.grad) && padded == count;
    }

    // As for cross entropy; what does not count is 0.
    void gather(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        Base::gather(n, d0, count, padded);
        for (int64_t i = 0; i < count && this->any_ignored; ++i)
            for (int64_t c = 0; p.y[i] == p.ignored && c < a.c; ++c) at(c)[i] = T(0);
    }

    // The own classes' probabilities and 1 minus these, and what makes the exps probabilities.
    void share(int64_t padded) {
#pragma omp simd
        for (int64_t i = 0; i < padded; ++i) {
            const double one = p.y[i] >= 0 ? 1.0 : 0.0, sum = p.others[i] + double(p.own[i]);
            const double scale = p.y[i] >= 0 ? one / sum : 0.0;
            f[i] = T(scale);
            own[i] = scale * double(p.own[i]);
            rest[i] = p.y[i] >= 0 ? scale * p.others[i] : 0.0;
        }
    }

    // The probabilities, those of the own classes apart: as the first pass left them, or made anew.
    void take(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        for (int64_t c = 0; c < a.c; ++c)
            copy_ahead(this->stretch(a.grad, n, d0, c), count, at(c), this->after(a.grad, n, d0, c, count));
        r.labels(n, d0, count, p.y);
        this->any_ignored = mark_ignored(p.y, count, a.ignore_index, p.ignored);
        own_logits(p, at(0), width, padded);
        for (int64_t i = 0; i < padded; ++i) own[i] = p.y[i] >= 0 ? double(p.own_x[i]) : 0.0;
        set_own(p.y, count, [](int64_t) { return T(0); }, at(0), width);
    }

    void make(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        gather(n, d0, count, padded);
        share(padded);
        for (int64_t c = 0; c < a.c; ++c) scale_and_sum(at(c), f, padded, at(c), at(c));
        for (int64_t i = 0; i < padded; ++i) own[i] = double(T(own[i]));
    }

    // A class with more than half of the probability that is not the own one leaves the tile: of how many
    // positions, which are listed.
    int64_t set_wrong_apart(int64_t count, int64_t padded, const Slopes* slopes) {
        std::fill_n(wrong, padded, 0.0);
        std::fill_n(wrong_slope, padded, 0.0);
        int64_t found = 0;
        for (int64_t i = 0; i < count; ++i) {
            set_apart[found] = Index(i);
            found += int64_t(largest[i] >= 0) & int64_t(p.y[i] >= 0);
        }
        for (int64_t k = 0; k < found; ++k) {
            const int64_t i = set_apart[k], c = largest[i];
            wrong[i] = double(std::exchange(at(c)[i], T(0)));
            wrong_slope[i] = slopes[c].outside;
        }
        return found;
    }

    // What the focal loss makes of the weights of the rows' gradients.
    void focus_rows(int64_t n) {
        const double gamma = a.gamma;
        with_power(gamma, [&](auto square) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) {
                const bool near = p.others[i] < 0.5;
                const double log_p = math::log1p(near ? -p.others[i] : own[i] - 1.0);
                losses[i] *= focal<decltype(square)::value>(own[i], p.others[i], -log_p, gamma).slope;
            }
        });
    }
};

// Returns -1, or the position (n * d) of the first class index that is out of range.
template <class T, class Kernel>
class Dice {
public:
    explicit Dice(const DiceArgs& args) : a(args), rows_args(rows_of(a)), rows(rows_args), overlap(a) {}

    int64_t run() {
        if (!a.masks)
            if (const int64_t bad = rows.check(); bad >= 0) return bad;
        if (a.grad.data) advise_huge_pages(a.grad.data, a.n * a.c * a.d * size_of(a.grad.dtype));
        tile = Kernel::lanes(a);
        per_block = std::max<int64_t>(4096 / tile, 1) * tile;
        blocks = (a.d + per_block - 1) / per_block;
        const int64_t groups = a.batch ? 1 : a.n, members = a.batch ? a.n : 1;
        const bool across = groups >= 2 * a.threads || groups % std::max<int64_t>(a.threads, 1) == 0;
        std::vector<double> parts(static_cast<size_t>(groups)), of_rows(static_cast<size_t>(groups));
        const auto each = [&](int64_t begin, int64_t end, Kernel* kernel) {
            for (int64_t g = begin; g < end; ++g)
                group(g, groups, members, kernel, parts[size_t(g)], of_rows[size_t(g)]);
        };
        // Images each by a thread, while caches hold them; where they are few, by all threads together.
        if (!a.batch && (across || blocks == 1))
            parallel_ranges(groups, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, a.c * a.d)),
                            [&](int64_t begin, int64_t end) {
                                each(begin, end, std::make_unique<Kernel>(a, rows).get());
                            });
        else
            each(0, groups, nullptr);
        if (a.total.data) {
            const bool none = a.mean && groups * overlap.entries() == 0;
            const double loss =
                total_sum(parts) + (a.by_rows != 0 ? a.by_rows * total_sum(of_rows) / rows.denominator : 0.0);
            store_one(a.total.data, a.total.dtype, 0, none ? std::numeric_limits<double>::quiet_NaN() : loss);
        }
        return fine;
    }

private:
    const DiceArgs& a;
    RowsArgs rows_args;
    Rows<T> rows;
    Overlap overlap;
    int64_t tile = 0, per_block = 0, blocks = 0;

    // f(kernel, block, n, first position, how many) for the tiles of the blocks of a group, in order within a
    // block; by the kernel that the thread has, or by one for each of all threads.
    template <class F>
    void tiles(int64_t g, int64_t members, Kernel* own, F&& f) {
        const auto run = [&](int64_t begin, int64_t end, Kernel& kernel) {
            for (int64_t b = begin; b < end; ++b) {
                const int64_t n = a.batch ? b / blocks : g, start = b % blocks * per_block;
                const int64_t stop = std::min(start + per_block, a.d);
                for (int64_t d = start; d < stop; d += tile) f(kernel, b, n, d, std::min(tile, stop - d));
            }
        };
        if (own) return run(0, members * blocks, *own);
        parallel_ranges(members * blocks, 1, [&](int64_t begin, int64_t end) {
            run(begin, end, *std::make_unique<Kernel>(a, rows));
        });
    }

    void group(int64_t g, int64_t groups, int64_t members, Kernel* own, double& part, double& of_rows) {
        const size_t count = size_t(members * blocks);
        std::vector<Sums> sums(count * size_t(a.c));
        std::vector<double> losses(count);
        tiles(g, members, own, [&](Kernel& kernel, int64_t b, int64_t n, int64_t d, int64_t size) {
            losses[size_t(b)] += kernel.sums(n, d, size, sums.data() + b * a.c);
        });
        std::vector<Sums> all(static_cast<size_t>(a.c));
        for (size_t k = 0; k < sums.size(); ++k) all[k % size_t(a.c)] += sums[k];
        of_rows = total_sum(losses);
        std::vector<Slopes> slopes(a.grad.data ? size_t(a.c) : 0);
        part = overlap.losses(g, groups, all.data(), slopes.empty() ? nullptr : slopes.data());
        if (slopes.empty()) return;
        const double arrives = a.incoming.data ? load_one(a.incoming.data, a.incoming.dtype, 0) : 1.0;
        const double by_rows = a.by_rows != 0 ? a.by_rows * arrives / rows.denominator : 0.0;
        tiles(g, members, own, [&](Kernel& kernel, int64_t, int64_t n, int64_t d, int64_t size) {
            kernel.gradient(n, d, size, slopes.data(), by_rows);
        });
    }
};

template <class T, class Kernel>
int64_t dice(const DiceArgs& a) {
    return Dice<T, Kernel>(a).run();
}

}  // namespace fusedloss
