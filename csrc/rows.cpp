// Kernels of rows of logits.
#include "cross_entropy.h"
#include "nll.h"

namespace fusedloss::kernels {

int64_t cross_entropy(const RowsArgs& a) {
    const bool wide = a.input.dtype == F64 || (a.probabilities && a.target.dtype == F64);
    return wide ? fusedloss::cross_entropy<double>(a) : fusedloss::cross_entropy<float>(a);
}

int64_t nll_loss(const RowsArgs& a) { return nll(a); }

}  // namespace fusedloss::kernels
