// The divergence of a row of a student's logits from a teacher's, for heads whose logits never exist as a
// whole.
//
// With log p_s and log p_t the log-softmax of both at the temperature, m = beta p_t + (1 - beta) p_s and l
// the log:
//   forward  sum_c p_t (l p_t - l p_s)                                    slope  p_s - p_t
//   reverse  K = sum_c p_s (l p_s - l p_t)                                slope  p_s (l p_s - l p_t - K)
//   js       beta sum_c p_t (l p_t - l m) + (1 - beta) K,                 slope  (1 - beta) p_s (l p_s - l m
//   - K)
//            K = sum_c p_s (l p_s - l m)
// Logits stay relative to their maximum, and of the logs of the sums only the difference is taken: neither a
// common offset nor certainty costs digits. As probabilities add up to 1, a sum of p_t (l p_t - l p_s) is
// that of p_t (l p_t - l p_s) + p_s - p_t: no term of it is negative, and a tiny divergence keeps its digits.
// It costs half as much again, so that only small ones, whose terms cancel, are taken once more by it.
//
// Of a process that has but a shard of the classes it goes by phases, and between them what all processes
// found is merged: the sums of both softmaxes, then those of the divergence, then those of the small ones.
#pragma once
#include "divergence_sums.h"

namespace fusedloss {

// l p_t - l p_s, from both relative to their maxima and what the logs of their sums differ by.
template <class T>
FUSEDLOSS_LOOP void log_ratios(const T* __restrict t, const T* __restrict s, T difference, int64_t n,
                               T* __restrict out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (t[i] - s[i]) - difference;
}

template <class T>
struct ToMixture {
    T teacher, student;
};

// l p_t - l m and l p_s - l m from d = l p_t - l p_s, for m = beta p_t + rest p_s: nothing of them
// underflows, and the smaller one keeps its digits where beta or rest is near 0. Where p_s is far above p_t,
// the student's is near -log rest for all classes: `shifted` are without that, and keep the digits beyond it.
template <class T>
struct Mixture {
    T beta, rest, ratio, log_rest;
    bool shifted = false;

    explicit Mixture(double beta)
        : beta(T(beta)), rest(T(1 - beta)), ratio(T(beta / (1 - beta))), log_rest(T(std::log1p(-beta))) {}

    ToMixture<T> operator()(T d) const { return shifted ? gaps<true>(d) : gaps<false>(d); }

    template <bool moved>
    __attribute__((always_inline)) ToMixture<T> gaps(T d) const {
        const bool teachers = d > T(0);
        const T size = math::abs(d), large = teachers ? beta : rest, small = teachers ? rest : beta;
        const T e = math::exp(-size), lost = math::expm1_of_negative(-size, e);
        const T near = math::log1p(small * lost), far = math::log(large + small * e);
        const T larger = -(small * lost > T(-0.5) ? near : far);
        const T excess = large * -lost / e, log_excess = math::log1p(excess);
        const T smaller = excess < T(1) ? -log_excess : larger - size;
        const T teacher = teachers ? larger : smaller, student = teachers ? smaller : larger;
        const T beyond = teachers ? student + log_rest : -math::log1p(ratio * e);
        return {teacher, moved ? beyond : student};
    }
};

template <bool moved, class T>
FUSEDLOSS_LOOP void mixture_gaps(T* __restrict d, const Mixture<T> mixture, int64_t n,
                                 T* __restrict teacher) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const ToMixture<T> gaps = mixture.template gaps<moved>(d[i]);
        teacher[i] = gaps.teacher;
        d[i] = gaps.student;
    }
}

// p (a - shift), and 0 where p is.
template <class T>
FUSEDLOSS_LOOP void weigh_gaps(const T* __restrict p, const T* __restrict a, T shift, T* __restrict out,
                               int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = p[i] == T(0) ? T(0) : p[i] * (a[i] - shift);
}

// x gap + y - x for y = x exp(-gap), gap = a + shift.
template <class T>
FUSEDLOSS_LOOP void excesses(const T* __restrict x, const T* __restrict y, const T* __restrict a, T shift,
                             T* __restrict out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const T gap = a[i] + shift, size = math::abs(gap), e = math::exp(-size);
        const T lost = math::expm1_of_negative(-size, e);
        const T near = gap > T(0) ? gap + lost : -(size + lost / e);
        const T found = size < T(1) ? x[i] * near : x[i] * gap + (y[i] - x[i]);
        out[i] = x[i] == T(0) ? y[i] : found;
    }
}

// beta q + rest p.
template <class T>
FUSEDLOSS_LOOP void mix(const T* __restrict q, const T* __restrict p, T beta, T rest, T* __restrict out,
                        int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = beta * q[i] + rest * p[i];
}

// p_s - p_t from p = p_s / of_s, q = p_t / of_t and d = l p_t - l p_s, without the digits that the difference
// loses.
template <class T>
FUSEDLOSS_LOOP void differences(const T* __restrict p, const T* __restrict q, const T* __restrict d, T of_s,
                                T of_t, T* __restrict out, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const bool teachers = d[i] > T(0);
        const T size = math::abs(d[i]), lost = math::expm1_of_negative(-size, math::exp(-size));
        const T slope = (teachers ? q[i] : -p[i]) * lost * (teachers ? of_t : of_s);
        out[i] = p[i] == T(0) && q[i] == T(0) ? T(0) : slope;
    }
}

template <class T>
class DistillKernel {
public:
    explicit DistillKernel(const DistillArgs& args)
        : a(args), by(T(1 / args.temperature)), mixture(args.beta) {
        if (!a.beyond) return;
        const double warmth = a.label ? std::min(a.temperature, 1.0) : a.temperature;
        ordinary = a.ordinary * warmth - largest_bias<T>(a.student, a.c);
        teacher_ordinary = a.teacher_ordinary * warmth - largest_bias<T>(a.teacher, a.c);
    }

    void operator()(int64_t n) {
        auto* kept = a.sums ? reinterpret_cast<DivergenceSums*>(a.sums) + n : nullptr;
        const bool whole = a.phase == WHOLE;
        if (whole || a.phase == GATHER) {
            all = DivergenceSums();
            gather(n);
            if (a.beyond) {
                a.beyond[n] = is_beyond(all.student.origin(), ordinary) ||
                              is_beyond(all.teacher.origin(), teacher_ordinary);
                if (a.beyond[n] && whole) return;
            }
            if (a.label) gather_hard(n);
        } else {
            all = *kept;
        }
        if (a.phase != GATHER) relate_tops();
        if (whole || a.phase == COMPARE) sum(n);
        const bool refines = (whole || a.phase == REFINE) && divergence() < small();
        if (refines) sum_small(n);
        if (a.phase == REFINE) a.beyond[n] = refines;
        if (whole || a.phase == FINISH)
            finish_row(n);
        else
            *kept = all;
    }

private:
    const DistillArgs& a;
    const T by;
    Mixture<T> mixture;
    DivergenceSums all;
    T difference = 0, own_gap = 0;
    double own = 0;  // what the student's largest class adds to the sum weighted by p_s
    double ordinary = 0, teacher_ordinary = 0;
    alignas(64) T s[row_block], t[row_block], p[row_block], q[row_block], d[row_block], out[row_block],
        to_teacher[row_block];

    template <class F>
    static void blocks(int64_t classes, F&& f) {
        for (int64_t c = 0; c < classes; c += row_block) f(c, std::min(row_block, classes - c));
    }

    // x' of a stretch of a row.
    void read(const Logits& x, double softcap, int64_t n, int64_t c, int64_t count, T* to) {
        const T* found = load_logits(x, n, c, count, to);
        if (found != to) std::copy_n(found, count, to);
        if (softcap > 0) {
            std::copy_n(to, count, out);
            cap_into(out, T(1 / softcap), T(softcap), count, to);
        }
    }

    void gather(int64_t n) {
        blocks(a.c, [&](int64_t c, int64_t count) {
            read(a.student, a.softcap, n, c, count, s);
            read(a.teacher, a.teacher_softcap, n, c, count, t);
            all.student.add(s, c, count, by, out);
            all.teacher.add(t, c, count, by, out);
        });
        if (all.student.top < 0) return;
        read(a.teacher, a.teacher_softcap, n, int64_t(all.student.top), 1, t);
        all.at = double(t[0]);
        all.student.top += double(a.first);
    }

    // From s and t: these relative to the maxima and divided by the temperature, and d.
    void relate(int64_t count) {
        gaps_to(s, T(all.student.origin()), by, count, s);
        gaps_to(t, T(all.teacher.origin()), by, count, t);
        log_ratios(t, s, difference, count, d);
    }

    void relate(int64_t n, int64_t c, int64_t count) {
        read(a.student, a.softcap, n, c, count, s);
        read(a.teacher, a.teacher_softcap, n, c, count, t);
        relate(count);
    }

    // The sum weighted by p_s is of gaps less that of the student's largest class, so that no digits are lost
    // where p_s is near 1.
    void relate_tops() {
        difference = T(all.teacher.log_sum<T>() - all.student.log_sum<T>());
        own = 0;
        own_gap = T(0);
        mixture.shifted = false;
        if (all.student.top < 0 || !a.of_student) return;
        s[0] = T(all.student.max);
        t[0] = T(all.at);
        relate(1);
        own_gap = !a.of_teacher ? -d[0] : mixture(d[0]).student;
        if (!std::isfinite(own_gap)) own_gap = T(0);
        own = double(own_gap);
        mixture.shifted = a.of_teacher && d[0] < T(-0.7);
        if (mixture.shifted) own_gap = mixture(d[0]).student;
    }

    void sum(int64_t n) {
        blocks(a.c, [&](int64_t c, int64_t count) {
            relate(n, c, count);
            exps_of(s, T(1), count, p);
            exps_of(t, T(1), count, q);
            bend(count);
            if (a.of_teacher) {
                weigh_gaps(q, a.of_student ? to_teacher : d, T(0), out, count);
                all.forward += ordered_sum(out, count);
            }
            if (a.of_student) {
                weigh_gaps(p, d, own_gap, out, count);
                all.mean += ordered_sum(out, count);
            }
        });
    }

    double mean() const { return all.mean / all.student.raised_sum(); }

    double divergence() const { return together(all.forward / all.teacher.raised_sum(), mean() + own); }

    // A larger divergence is no difference of far larger terms.
    double small() const { return 0.08 * (a.of_teacher && a.of_student ? 4 * a.beta * (1 - a.beta) : 1.0); }

    void finish_row(int64_t n) {
        double soft = divergence();
        if (soft < small()) soft = together(all.small_forward, all.small_reverse) / all.teacher.raised_sum();
        if (a.of_teacher && a.of_student)
            soft = std::min(soft, -a.beta * std::log(a.beta) - (1 - a.beta) * std::log1p(-a.beta));
        RowSums<T> hard;
        hard.max = all.student.origin();
        hard.others = all.hard_others;
        hard.own = all.hard_own;
        hard.own_x = all.hard_x;
        if (a.loss) a.loss[n] = a.soft_weight * soft + (a.label ? a.hard_weight * hard.own_loss() : 0.0);
        if (a.differentiate) differentiate(n, hard);
    }

    // d becomes what p_s weighs: l p_s - l p_t, or l p_s - l m.
    void bend(int64_t count) {
        if (a.of_student && !a.of_teacher) scale_and_shift(d, T(-1), T(0), count);
        if (a.of_student && a.of_teacher)
            mixture.shifted ? mixture_gaps<true>(d, mixture, count, to_teacher)
                            : mixture_gaps<false>(d, mixture, count, to_teacher);
    }

    double together(double forward, double reverse) const {
        return !a.of_student ? forward : !a.of_teacher ? reverse : a.beta * forward + (1 - a.beta) * reverse;
    }

    // The divergence of a row, by terms none of which is negative.
    void sum_small(int64_t n) {
        const T shift = mixture.shifted ? -mixture.log_rest : T(0);
        const double ratio = all.teacher.raised_sum() / all.student.raised_sum();
        blocks(a.c, [&](int64_t c, int64_t count) {
            relate(n, c, count);
            exps_of(s, T(ratio), count, p);  // of the teacher's unit
            exps_of(t, T(1), count, q);
            bend(count);
            if (a.of_student && a.of_teacher) mix(q, p, mixture.beta, mixture.rest, t, count);
            if (a.of_teacher) {
                excesses(q, a.of_student ? t : p, a.of_student ? to_teacher : d, T(0), out, count);
                all.small_forward += ordered_sum(out, count);
            }
            if (a.of_student) {
                excesses(p, a.of_teacher ? t : q, d, shift, out, count);
                all.small_reverse += ordered_sum(out, count);
            }
        });
    }

    // Of the hard term, whose maximum is the student's.
    void gather_hard(int64_t n) {
        const T max = T(all.student.origin());
        const int64_t y = a.label[n] - a.first;
        blocks(a.c, [&](int64_t c, int64_t count) {
            read(a.student, a.softcap, n, c, count, s);
            exp_of_difference(s, max, count, out, s + count, sizeof(T));
            if (y >= c && y < c + count) {
                all.hard_own = double(out[y - c]);
                all.hard_x = double(s[y - c]);
                out[y - c] = T(0);
            }
            all.hard_others += quick_sum(out, count);
        });
    }

    void differentiate(int64_t n, const RowSums<T>& hard) {
        const double g = a.incoming ? a.incoming[n] : 1.0;
        const double scale =
            g * a.soft_weight / a.temperature * (a.of_teacher && a.of_student ? 1 - a.beta : 1.0);
        const double of_s = scale / all.student.sum<T>(), of_t = scale / all.teacher.sum<T>();
        const T unit = too_small<T>(of_s) || too_small<T>(of_t) ? math::lowered<T> : T(1);
        const double down = double(math::lowered<T>) / double(unit);
        blocks(a.c, [&](int64_t c, int64_t count) {
            relate(n, c, count);
            exps_of(s, unit, count, p);
            if (!a.of_student) {
                exps_of(t, unit, count, q);
                differences(p, q, d, T(of_s * down), T(of_t * down), out, count);
            } else {
                bend(count);
                weigh_gaps(p, d, T(mean() + double(own_gap)), out, count);
                if (const int64_t top = int64_t(all.student.top) - a.first; top >= c && top < c + count)
                    out[top - c] = -p[top - c] * T(mean());
                scale_and_shift(out, T(of_s * down), T(0), count);
            }
            std::copy_n(out, count, q);  // `read` needs `out`
            if (a.label || a.softcap > 0) read(a.student, a.softcap, n, c, count, s);
            if (a.softcap > 0) std::copy_n(s, count, t);
            if (a.label) {
                const double hard_scale = g * a.hard_weight;
                soften_by(s, T(hard.max), hard_scale / hard.sum(), T(0), count);
                // p - 1 as minus the others' share: exact where p is near 1.
                if (const int64_t y = a.label[n] - a.first; y >= c && y < c + count)
                    s[y - c] = T(-hard_scale * (hard.others / hard.raised_sum()));
                take(q, T(-1), s, count);
            }
            if (a.softcap > 0) uncap(q, t, T(1 / a.softcap), count);
            store(memory(a.student, n, c), a.student.dtype, 1, count, q);
        });
    }
};

template <class T>
void distill_rows(const DistillArgs& a) {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, a.c));
    parallel_ranges(a.n, grain, [&](int64_t begin, int64_t end) {
        const auto kernel = std::make_unique<DistillKernel<T>>(a);
        for (int64_t n = begin; n < end; ++n) (*kernel)(n);
    });
}

}  // namespace fusedloss
