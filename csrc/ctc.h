// Connectionist temporal classification: sums over all alignments of labels with a longer sequence of frames.
// A probability is a mantissa and an exponent of 2, both doubles: nothing under- or overflows, and a sum
// loses no more than its own rounding. Between labels 1 to S stand blanks 0 to S; label 0 is none, and has no
// probability.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "convert.h"
#include "libm.h"
#include "math.h"
#include "parallel.h"

namespace fusedloss::ctc {

constexpr double zero_exponent = -1e300;  // of probability 0: below that of any other
constexpr double ln2_hi = math::detail::Format<double>::ln2_hi, ln2_lo = math::detail::Format<double>::ln2_lo;

// 2^k for an integer k <= 1000; 0 far below 1.
inline double power(double k) {
    constexpr double round =
        0x1.8p52 + 1023;  // the sum has no room for a fraction: its low bits are the exponent
    const double p = math::detail::from_bits<double>(math::detail::bits(k + round) << 52);
    return k < -1000.0 ? 0.0 : p;
}

// m 2^k, subnormal or 0 where it must be.
inline double scaled(double m, double k) {
    const double half = (0.5 * k + 0x1.8p52) - 0x1.8p52;
    return k < -1400.0 ? 0.0 : m * power(half) * power(k - half);
}

// By value: std::max gives a reference, of which no vector is made.
inline double larger(double a, double b) { return a < b ? b : a; }

// Probabilities of blanks and of labels, by their place; before the first and after the last stands one that
// is 0.
struct States {
    double *blank, *blank_exponent, *label, *label_exponent;
};

inline int64_t words(int64_t size) { return 4 * (size + 2); }

inline States states(double* memory, int64_t size) {
    double* p = memory + 1;
    const int64_t step = size + 2;
    return {p, p + step, p + 2 * step, p + 3 * step};
}

inline void clear(double* memory, int64_t size) {
    const int64_t step = size + 2;
    for (int64_t k = 0; k < 4; ++k) std::fill_n(memory + k * step, step, k % 2 ? zero_exponent : 0.0);
}

// The probabilities of one frame.
struct Frame {
    double *label, *label_exponent;  // of the labels by their place
    double blank, blank_exponent;
};

// exp(x[i]) as mantissas around 1 and exponents.
FUSEDLOSS_LOOP inline void split(const double* __restrict x, int64_t n, double* __restrict mantissa,
                                 double* __restrict exponent) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        constexpr double log2e = 0x1.71547652b82fep0, round = 0x1.8p52;
        const double v = x[i];
        const bool far = math::abs(v) > 1e15, finite = v < 1e300;  // from 1e15 on a double has no fraction
        const double near = far ? 0.0 : v, k = near * log2e + round - round;
        const double high = near - k * ln2_hi, low = k * ln2_lo, r = high - low, rr = r * r;
        const double y = 1.0 + (high + (rr * math::detail::exp_tail(r, rr) - low));
        const bool zero = v < -7e299;
        mantissa[i] = zero ? 0.0 : finite ? y : std::numeric_limits<double>::quiet_NaN();
        exponent[i] = zero ? zero_exponent : !finite ? 0.0 : far ? v * log2e : k;
    }
}

// From one frame to the next: `next` = (what leads to each state) times the probabilities of the frame.
// skip[j] is 1 where label j may follow label j - 1 without a blank.
FUSEDLOSS_LOOP inline void forth(const States& from, const Frame& frame, const double* __restrict skip,
                                 int64_t size, const States& next) {
    const double* __restrict b = from.blank, * __restrict be = from.blank_exponent;
    const double* __restrict l = from.label, * __restrict le = from.label_exponent;
    const double* __restrict y = frame.label, * __restrict ye = frame.label_exponent;
    double* __restrict nb = next.blank, * __restrict nbe = next.blank_exponent;
    double* __restrict nl = next.label, * __restrict nle = next.label_exponent;
    const double p = frame.blank, pe = frame.blank_exponent;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
        const double most = larger(be[j], le[j]);
        nb[j] = (b[j] * power(be[j] - most) + l[j] * power(le[j] - most)) * p;
        nbe[j] = most + pe;
        const double third = skip[j] > 0.0 ? le[j - 1] : zero_exponent;
        const double top = larger(larger(le[j], be[j - 1]), third);
        nl[j] = ((l[j] * power(le[j] - top) + b[j - 1] * power(be[j - 1] - top)) +
                 skip[j] * l[j - 1] * power(third - top)) *
                y[j];
        nle[j] = top + ye[j];
    }
}

// Backwards: `before` = the probability of what follows each state, given `after`, that of what follows those
// of the frame after it.
FUSEDLOSS_LOOP inline void back(const States& after, const Frame& frame, const double* __restrict skip,
                                int64_t size, const States& before) {
    const double* __restrict b = after.blank, * __restrict be = after.blank_exponent;
    const double* __restrict l = after.label, * __restrict le = after.label_exponent;
    const double* __restrict y = frame.label, * __restrict ye = frame.label_exponent;
    double* __restrict nb = before.blank, * __restrict nbe = before.blank_exponent;
    double* __restrict nl = before.label, * __restrict nle = before.label_exponent;
    const double p = frame.blank, pe = frame.blank_exponent;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
        const double stay = b[j] * p, on = l[j + 1] * y[j + 1], same = l[j] * y[j];
        const double se = be[j] + pe, oe = le[j + 1] + ye[j + 1], me = le[j] + ye[j];
        const double most = larger(se, oe);
        nb[j] = stay * power(se - most) + on * power(oe - most);
        nbe[j] = most;
        const double third = skip[j + 1] > 0.0 ? oe : zero_exponent;
        const double top = larger(larger(me, se), third);
        nl[j] = (same * power(me - top) + stay * power(se - top)) + skip[j + 1] * on * power(third - top);
        nle[j] = top;
    }
}

// Mantissas to [3/4, 3/2): between two of these, they grow and shrink by less than 2^80.
constexpr int64_t between = 32;
FUSEDLOSS_LOOP inline void normalize(double* __restrict mantissa, double* __restrict exponent, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const math::detail::Split<double> s = math::detail::split(mantissa[i]);
        const bool positive = mantissa[i] > 0.0;
        mantissa[i] = positive ? 1.0 + s.f : mantissa[i];
        exponent[i] = positive ? exponent[i] + s.k : exponent[i];
    }
}

inline void normalize(const States& s, int64_t size) {
    normalize(s.blank, s.blank_exponent, size);
    normalize(s.label, s.label_exponent, size);
}

// The probabilities of the states of a frame, of `total` = mantissa and exponent.
FUSEDLOSS_LOOP inline void shares(const double* __restrict a, const double* __restrict ae,
                                  const double* __restrict b, const double* __restrict be, int64_t n,
                                  double total, double total_exponent, double* __restrict out) {
    const double inverse = 1.0 / total;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = scaled(a[i] * b[i] * inverse, (ae[i] - total_exponent) + be[i]);
}

// log(exp a + exp b + exp c): the greatest is added to what the others are beside it, so that a sum near 0
// has its digits.
inline double log_add(double a, double b, double c) {
    const double x = std::max(a, b), y = std::min(a, b), top = std::max(x, c), z = std::min(x, c);
    const double origin = top > -math::detail::infinity<double> ? top : 0.0;
    return top + math::log1p(math::exp(y - origin) + math::exp(z - origin));
}

FUSEDLOSS_LOOP inline void log_forth(const double* __restrict b, const double* __restrict l,
                                     const double* __restrict y, double blank, const double* __restrict skip,
                                     int64_t size, double* __restrict nb, double* __restrict nl) {
    constexpr double none = -math::detail::infinity<double>;
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
        nb[j] = blank + log_add(b[j], l[j], none);
        nl[j] = y[j] + log_add(l[j], b[j - 1], skip[j] > 0.0 ? l[j - 1] : none);
    }
}

// Sequences, one after the other, with the memory of the longest.
class Sequences {
public:
    explicit Sequences(const CtcArgs& args)
        : a_(args), most_(args.most + 1), skip_(vector(1)), logits_(vector(1)) {
        frame_ = vector(2);
        shares_ = vector(1);
        sums_ = vector(1);
        classes_.resize(size_t(most_));
        places_.resize(size_t(most_));
        // Frames whose states are kept at a time: all of them, or the states before each such span start it
        // again.
        constexpr int64_t cached = (int64_t(1) << 20) / int64_t(sizeof(double));
        span_ = 16;
        if (gradient()) span_ = std::max({int64_t(std::sqrt(double(a_.t))), cached / words(most_), span_});
        span_ = std::max<int64_t>(1, std::min(span_, a_.t));
        kept_ = cleared(span_);
        starts_ = cleared(gradient() ? (a_.t + span_ - 1) / span_ + 1 : 1);
        after_ = cleared(2);
        if (gradient()) row_.resize(size_t(a_.c));
    }

    // The loss of sequence n; its gradient times `scale` is stored.
    double run(int64_t n, double scale) {
        n_ = n;
        frames_ = a_.lengths[n];
        size_ = a_.lengths[a_.n + n] + 1;
        load_labels(a_.lengths[2 * a_.n + n]);
        const double loss = forwards();
        if (gradient()) {
            const int64_t counted = total_ == 0.0 ? 0 : frames_;
            for (int64_t t = counted; t < a_.t; ++t) store_row(t);
            if (counted) backwards(scale);
        }
        // Of a sum near 1 the logarithm has few digits.
        const double near = a_.input.dtype == F64 ? 1.0 : 4e-8 * double(frames_);
        return loss < near ? near_certainty() : loss;
    }

private:
    bool gradient() const { return a_.grad.data != nullptr; }
    std::vector<double> vector(int64_t count) const {
        return std::vector<double>(size_t(count * (most_ + 2)));
    }
    std::vector<double> cleared(int64_t count) const {
        std::vector<double> memory(size_t(count * words(most_)));
        for (int64_t k = 0; k < count; ++k) clear(memory.data() + k * words(most_), most_);
        return memory;
    }
    States place(std::vector<double>& memory, int64_t k) const {
        return states(memory.data() + k * words(most_), most_);
    }
    int64_t starts(int64_t span) const { return gradient() ? span : 0; }
    int64_t spans() const { return (frames_ + span_ - 1) / span_; }

    void load_labels(int64_t begin) {
        classes_[0] = a_.blank;
        distinct_ = 1;
        int64_t before = -1;
        for (int64_t j = 1; j < size_; ++j) {
            const int64_t y = load_index(a_.target.data, a_.target.dtype, begin + (j - 1) * a_.label_stride);
            skip_[size_t(j)] = j > 1 && y != before;
            const auto first = classes_.begin(), end = first + distinct_, found = std::find(first, end, y);
            places_[size_t(j)] = found - first;
            if (found == end) classes_[size_t(distinct_++)] = y;
            before = y;
        }
        skip_[size_t(size_)] = 0.0;
    }

    // The logits of blank and labels.
    const double* logits(int64_t t) {
        with_float(a_.input.dtype, [&](auto tag) {
            using S = decltype(tag);
            const int64_t* stride = a_.input.stride;
            const S* row = static_cast<const S*>(a_.input.data) + t * stride[0] + n_ * stride[1];
            for (int64_t j = 0; j < size_; ++j)
                logits_[size_t(j)] =
                    convert<S, double>(row[classes_[size_t(places_[size_t(j)])] * stride[2]]);
        });
        return logits_.data();
    }

    Frame frame(int64_t t) {
        double *p = frame_.data(), *e = p + most_ + 2;
        split(logits(t), size_, p, e);
        const Frame found{p, e, p[0], e[0]};
        p[0] = p[size_] = e[0] = e[size_] = 0.0;
        return found;
    }

    void walk(int64_t span) {
        const int64_t first = span * span_, end = std::min(first + span_, frames_);
        States from = place(starts_, starts(span));
        for (int64_t t = first; t < end; ++t) {
            const States to = place(kept_, t - first);
            forth(from, frame(t), skip_.data(), size_, to);
            if (t % between == between - 1) normalize(to, size_);
            from = to;
        }
        last_ = from;
    }

    double forwards() {
        clear(starts_.data(), most_);
        last_ = place(starts_, 0);
        last_.blank[0] = 1.0;
        last_.blank_exponent[0] = 0.0;
        for (int64_t span = 0; span < spans(); ++span) {
            walk(span);
            if (span + 1 < spans()) {
                const double* memory = last_.blank - 1;
                std::copy_n(memory, words(most_), starts_.data() + starts(span + 1) * words(most_));
            }
        }
        const int64_t j = size_ - 1;
        const double be = last_.blank_exponent[j], le = last_.label_exponent[j];
        total_exponent_ = std::max(be, le);
        total_ = last_.blank[j] * power(be - total_exponent_) + last_.label[j] * power(le - total_exponent_);
        if (total_ == 0.0) return math::detail::infinity<double>;
        return -(total_exponent_ * ln2_hi + (std::log(total_) + total_exponent_ * ln2_lo));
    }

    void backwards(double scale) {
        for (int64_t k = 0; k < 2; ++k) clear(after_.data() + k * words(most_), most_);
        States after = place(after_, 0), before = place(after_, 1);
        after.blank[size_ - 1] = after.label[size_ - 1] = 1.0;
        after.blank_exponent[size_ - 1] = after.label_exponent[size_ - 1] = 0.0;
        for (int64_t span = spans() - 1; span >= 0; --span) {
            if (span + 1 < spans()) walk(span);
            for (int64_t t = std::min((span + 1) * span_, frames_) - 1; t >= span * span_; --t) {
                gather(place(kept_, t - span * span_), after, scale);
                store_row(t);
                back(after, frame(t), skip_.data(), size_, before);
                if (t % between == 0) normalize(before, size_);
                std::swap(after, before);
            }
        }
    }

    // The shares of all alignments that are in the states of a frame, by class.
    void gather(const States& until, const States& after, double scale) {
        double* share = shares_.data();
        shares(until.blank, until.blank_exponent, after.blank, after.blank_exponent, size_, total_,
               total_exponent_, share);
        std::fill_n(sums_.begin(), distinct_, 0.0);
        sums_[0] = ordered_sum(share, size_);
        shares(until.label, until.label_exponent, after.label, after.label_exponent, size_, total_,
               total_exponent_, share);
        for (int64_t j = 1; j < size_; ++j) sums_[size_t(places_[size_t(j)])] += share[j];
        for (int64_t k = 0; k < distinct_; ++k) row_[size_t(classes_[size_t(k)])] = -scale * sums_[size_t(k)];
    }

    // The row of the gradient, which is 0 again afterwards.
    void store_row(int64_t t) {
        const Grid& g = a_.grad;
        store(at(g.data, g.dtype, t * g.stride[0] + n_ * g.stride[1]), g.dtype, g.stride[2], a_.c,
              row_.data());
        for (int64_t k = 0; k < distinct_; ++k) row_[size_t(classes_[size_t(k)])] = 0.0;
    }

    double near_certainty() {
        constexpr double none = -math::detail::infinity<double>;
        States now = place(after_, 0), next = place(after_, 1);
        for (const States& s : {now, next}) {
            std::fill_n(s.blank - 1, size_ + 1, none);
            std::fill_n(s.label - 1, size_ + 1, none);
        }
        now.blank[0] = 0.0;
        for (int64_t t = 0; t < frames_; ++t) {
            const double *y = logits(t), blank = y[0];
            logits_[0] = none;
            log_forth(now.blank, now.label, y, blank, skip_.data(), size_, next.blank, next.label);
            std::swap(now, next);
        }
        return -log_add(now.blank[size_ - 1], now.label[size_ - 1], none);
    }

    const CtcArgs& a_;
    int64_t most_, span_ = 0, n_ = 0, frames_ = 0, size_ = 0, distinct_ = 0;
    double total_ = 0, total_exponent_ = 0;
    States last_{};
    std::vector<double> skip_, logits_, frame_, shares_, sums_, kept_, starts_, after_, row_;
    std::vector<int64_t> classes_, places_;
};

// Returns -1, or the place (n, label) of the first label that is no class.
inline int64_t check(const CtcArgs& a) {
    for (int64_t n = 0; n < a.n; ++n) {
        const int64_t labels = a.lengths[a.n + n], begin = a.lengths[2 * a.n + n];
        for (int64_t j = 0; j < labels; ++j) {
            const int64_t y = load_index(a.target.data, a.target.dtype, begin + j * a.label_stride);
            if (y < 0 || y >= a.c) return n * a.most + j;
        }
    }
    return fine;
}

inline int64_t run(const CtcArgs& a) {
    if (const int64_t wrong = check(a); wrong >= 0) return wrong;
    std::vector<double> losses(size_t(a.n));
    parallel_ranges(a.n, 1, [&](int64_t begin, int64_t end) {
        Sequences sequences(a);
        for (int64_t n = begin; n < end; ++n) {
            const double parts = a.mean ? double(std::max<int64_t>(a.lengths[a.n + n], 1)) : 1.0;
            const double arrives =
                a.incoming.data ? load_one(a.incoming.data, a.incoming.dtype, n * a.incoming_stride) : 1.0;
            const double loss = sequences.run(n, a.mean ? arrives / (parts * a.denominator) : arrives);
            const bool drop = a.zero_infinity && loss == math::detail::infinity<double>;
            losses[size_t(n)] = drop ? 0.0 : loss / parts;
        }
    });
    if (a.loss.data)
        for (int64_t n = 0; n < a.n; ++n) store_one(a.loss.data, a.loss.dtype, n, losses[size_t(n)]);
    if (a.total.data)
        store_one(a.total.data, a.total.dtype, 0, total_sum(losses) / (a.mean ? a.denominator : 1.0));
    return fine;
}

}  // namespace fusedloss::ctc
