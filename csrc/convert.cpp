// The conversions that every kernel shares.
#include "convert.h"

namespace fusedloss {

template void load_strided(const void*, int64_t, int64_t, int64_t, float* __restrict);
template void load_strided(const void*, int64_t, int64_t, int64_t, double* __restrict);
template void store(void*, int64_t, int64_t, int64_t, const float* __restrict);
template void store(void*, int64_t, int64_t, int64_t, const double* __restrict);

}  // namespace fusedloss
