// The functions of math.h over arrays, for the tests: fusedloss_math_exp_f32(in, out, n) and so on.
#pragma once

#include <cstdint>

#include "math.h"

#define FUSEDLOSS_PROBE(name, suffix, T)                                                     \
    extern "C" __attribute__((visibility("default"))) void fusedloss_math_##name##_##suffix( \
        const T* in, T* out, std::int64_t n) {                                               \
        fusedloss::math::map(out, n, [](auto x) { return fusedloss::math::name(x); }, in);   \
    }

#define FUSEDLOSS_PROBES(name)        \
    FUSEDLOSS_PROBE(name, f32, float) \
    FUSEDLOSS_PROBE(name, f64, double)

FUSEDLOSS_PROBES(exp)
FUSEDLOSS_PROBES(exp_softmax)
FUSEDLOSS_PROBES(log)
FUSEDLOSS_PROBES(log1p)
FUSEDLOSS_PROBES(sigmoid)
FUSEDLOSS_PROBES(log_sigmoid)

#undef FUSEDLOSS_PROBES
#undef FUSEDLOSS_PROBE

extern "C" __attribute__((visibility("default"))) void fusedloss_math_pow_f64(const double* x, double p,
                                                                              double* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        out[i] = fusedloss::math::pow(x[i], p);
    }
}
