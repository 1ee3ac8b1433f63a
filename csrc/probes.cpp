// The functions of math.h over arrays, for the tests: fusedloss_math_exp_f32(in, out, n) and so on.
#include "convert.h"
#include "math.h"

#define FUSEDLOSS_PROBE(name, suffix, T, value)                                                   \
    FUSEDLOSS_EXPORT void fusedloss_math_##name##_##suffix(const T* in, T* out, std::int64_t n) { \
        fusedloss::math::map(out, n, [](auto x) { return fusedloss::math::value; }, in);          \
    }

#define FUSEDLOSS_PROBES(name, value)        \
    FUSEDLOSS_PROBE(name, f32, float, value) \
    FUSEDLOSS_PROBE(name, f64, double, value)

FUSEDLOSS_PROBES(exp, exp(x))
FUSEDLOSS_PROBES(exp_softmax, exp_softmax(x))
FUSEDLOSS_PROBES(exp_raised, exp_raised(x))
FUSEDLOSS_PROBES(log, log(x))
FUSEDLOSS_PROBES(log1p, log1p(x))
FUSEDLOSS_PROBES(log_part, logs_of_parts(x).part)
FUSEDLOSS_PROBES(log_rest, logs_of_parts(x).rest)
FUSEDLOSS_PROBES(sigmoid, sigmoid(x))
FUSEDLOSS_PROBES(log_sigmoid, log_sigmoid(x))

#undef FUSEDLOSS_PROBES
#undef FUSEDLOSS_PROBE

FUSEDLOSS_EXPORT void fusedloss_math_pow_f64(const double* x, double p, double* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        out[i] = fusedloss::math::pow(x[i], p);
    }
}
