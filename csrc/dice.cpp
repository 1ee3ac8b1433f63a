// Kernels of overlaps.
#include "dice.h"

namespace fusedloss::kernels {

int64_t dice(const DiceArgs& a) {
    if (a.activation != 0 || a.masks) return fusedloss::dice<double, Masks>(a);
    return a.input.dtype == F64 ? fusedloss::dice<double, Indices<double>>(a)
                                : fusedloss::dice<float, Indices<float>>(a);
}

}  // namespace fusedloss::kernels
