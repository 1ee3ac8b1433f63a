// Kernels of overlaps.
#include "dice.h"

namespace fusedloss::kernels {
namespace {

// Where sums have many terms, and masks and what is ignored are floats.
bool in_float(const DiceArgs& a) {
    const bool few = (a.batch ? a.n : 1) * a.d < 64;
    const bool wide = a.input.dtype == F64 || (a.masks && a.target.dtype == F64);
    const int64_t most = 1 << 24;
    return !few && !wide && -most < a.ignore_index && a.ignore_index < most;
}

}  // namespace

int64_t dice(const DiceArgs& given) {
    DiceArgs a = given;
    if (a.batch && a.d == 1) {  // (N, C, 1) is (1, C, N), of which the sums are the same
        for (Grid* grid : {&a.input, &a.target, &a.grad}) grid->stride[2] = grid->stride[0];
        std::swap(a.n, a.d);
    }
    if (a.activation != 0)
        return in_float(a) ? fusedloss::dice<float, Apart<float>>(a)
                           : fusedloss::dice<double, Apart<double>>(a);
    if (a.masks) return fusedloss::dice<double, Together>(a);
    return a.input.dtype == F64 ? fusedloss::dice<double, Indices<double>>(a)
                                : fusedloss::dice<float, Indices<float>>(a);
}

}  // namespace fusedloss::kernels
