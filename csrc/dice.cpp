// Kernels of overlaps.
#include "dice.h"

namespace fusedloss::kernels {
namespace {

// Where no classes are weighed against each other, sums have many terms, and masks and what is ignored are
// floats.
bool in_float(const DiceArgs& a) {
    const bool few = (a.batch ? a.n : 1) * a.d < 64;
    const bool wide = a.input.dtype == F64 || (a.masks && a.target.dtype == F64);
    return a.activation != 0 && !few && !wide && std::abs(a.ignore_index) < 1 << 24;
}

}  // namespace

int64_t dice(const DiceArgs& given) {
    DiceArgs a = given;
    if (a.batch && a.d == 1) {  // (N, C, 1) is (1, C, N), of which the sums are the same
        for (Grid* grid : {&a.input, &a.target, &a.grad}) grid->stride[2] = grid->stride[0];
        std::swap(a.n, a.d);
    }
    if (a.activation != 0 || a.masks)
        return in_float(a) ? fusedloss::dice<float, Masks<float>>(a)
                           : fusedloss::dice<double, Masks<double>>(a);
    return a.input.dtype == F64 ? fusedloss::dice<double, Indices<double>>(a)
                                : fusedloss::dice<float, Indices<float>>(a);
}

}  // namespace fusedloss::kernels
