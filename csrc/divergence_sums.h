// What is known of a row of two heads: of all its classes, or of those of a process, and what makes these
// one.
#pragma once
#include "linear.h"

namespace fusedloss {

// exp(x) for x <= 0, raised, times `by`; `out` may be `x`.
template <class T>
FUSEDLOSS_LOOP void exps_of(const T* x, T by, int64_t n, T* out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = math::exp_raised(x[i]) * by;
}

// (x - origin) * by; `out` may be `x`.
template <class T>
FUSEDLOSS_LOOP void gaps_to(const T* x, T origin, T by, int64_t n, T* out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - origin) * by;
}

// As `brought`; of nothing it is nothing, from wherever.
inline double moved(double sum, double gap) { return sum == 0 || gap == 0 ? sum : brought(sum, gap); }

// The softmax at a temperature of what comes in stretches. The largest class is kept apart, as in
// cross_entropy.h.
struct Softmax {
    double max = -std::numeric_limits<double>::infinity();
    double others = 0, own = 0;  // raised
    double top = -1;             // the largest class

    // Those from class c on; 1 / temperature is `by`.
    template <class T>
    void add(const T* x, int64_t c, int64_t n, T by, T* buffer) {
        const T largest = greatest(x, n, T(max));
        const bool is_larger = double(largest) > max;
        if (is_larger) rise(double(largest), double(by));
        gaps_to(x, T(origin()), by, n, buffer);
        exps_of(buffer, T(1), n, buffer);
        if (is_larger) {
            const int64_t at = first_one(buffer, n);  // none where max is inf
            own = at < n ? double(math::raised<T>) : 0;
            top = at < n ? double(c + at) : -1;
            if (at < n) buffer[at] = T(0);
        }
        others += quick_sum(buffer, n);
    }

    // Those of another process, whose classes come after.
    void join(const Softmax& s, double by) {
        if (s.raised_sum() == 0) return;
        if (s.max > max) {
            rise(s.max, by);
            own = s.own;
            top = s.top;
            others += s.others;
        } else {
            others += moved(s.raised_sum(), (s.max - max) * by);
        }
    }

    double origin() const { return max == -std::numeric_limits<double>::infinity() ? 0.0 : max; }
    double raised_sum() const { return others + own; }
    template <class T>
    double sum() const {
        return raised_sum() * double(math::lowered<T>);
    }
    // Relative to the maximum: together they would have no more digits than the maximum leaves.
    template <class T>
    double log_sum() const {
        return own > 0 ? std::log1p(others * double(math::lowered<T>)) : std::log(sum<T>());
    }

private:
    void rise(double largest, double by) {
        others = moved(raised_sum(), (max - largest) * by);
        own = 0;
        max = largest;
    }
};

// What is known of a row of all classes, or of those of a process.
struct DivergenceSums {
    Softmax student, teacher;
    double at = 0;  // the teacher's logit of the student's largest class
    double hard_others = 0, hard_own = 0, hard_x = 0;
    double forward = 0, mean = 0;  // raised: the sums of p_t and of p_s
    double small_forward = 0, small_reverse = 0;
};
static_assert(sizeof(DivergenceSums) == divergence_sums * sizeof(double));
static_assert(offsetof(DivergenceSums, forward) == softmax_sums * sizeof(double));

// What processes gathered of a row, each of its own classes, in the order of their ranks.
inline void merge_divergences(const MergeArgs& a) {
    const double by = 1 / a.temperature;
    parallel_ranges(a.n, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            DivergenceSums all;
            for (int64_t k = 0; k < a.ranks; ++k) {
                DivergenceSums s;
                std::copy_n(a.parts + (k * a.n + n) * softmax_sums, softmax_sums,
                            reinterpret_cast<double*>(&s));
                const double before = all.student.origin();
                if (s.student.max > all.student.max) all.at = s.at;
                all.student.join(s.student, by);
                all.teacher.join(s.teacher, by);
                const double now = all.student.origin(), gap = s.student.origin() - now;
                all.hard_others = moved(all.hard_others, before - now) + moved(s.hard_others, gap);
                all.hard_own = moved(all.hard_own, before - now) + moved(s.hard_own, gap);
                all.hard_x += s.hard_x;  // of the process that has the class, and 0 of the others
            }
            reinterpret_cast<DivergenceSums*>(a.sums)[n] = all;
        }
    });
}

}  // namespace fusedloss
