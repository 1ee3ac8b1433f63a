// The kernel of the triplet margin loss.
#include "triplet.h"

namespace fusedloss::kernels {

int64_t triplet(const TripletArgs& a) {
    bool wide = false;
    for (const Matrix& input : a.input) wide |= input.dtype == F64;
    return wide ? fusedloss::triplet<double>(a) : fusedloss::triplet<float>(a);
}

}  // namespace fusedloss::kernels
