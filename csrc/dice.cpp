// Kernels of overlaps.
#include "dice.h"

namespace fusedloss::kernels {

int64_t dice(const DiceArgs& given) {
    DiceArgs a = given;
    if (a.batch && a.d == 1) {  // (N, C, 1) is (1, C, N), of which the sums are the same
        for (Grid* grid : {&a.input, &a.target, &a.grad}) grid->stride[2] = grid->stride[0];
        std::swap(a.n, a.d);
    }
    if (a.activation != 0 || a.masks) return fusedloss::dice<double, Masks>(a);
    return a.input.dtype == F64 ? fusedloss::dice<double, Indices<double>>(a)
                                : fusedloss::dice<float, Indices<float>>(a);
}

}  // namespace fusedloss::kernels
