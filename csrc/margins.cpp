// The kernel of losses of margins.
#include "margins.h"

namespace fusedloss::kernels {

int64_t margins(const MarginArgs& a) {
    return a.input.dtype == F64 ? margins_of<double>(a) : margins_of<float>(a);
}

}  // namespace fusedloss::kernels
