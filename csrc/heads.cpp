// Kernels of heads whose logits never exist as a whole.
#if defined(FUSEDLOSS_NARROW)
// Whatever their size, heads run the other library's.
#include "args.h"

namespace fusedloss::kernels {

int64_t linear(const LinearArgs&) { __builtin_trap(); }
int64_t distill(const DistillArgs&) { __builtin_trap(); }
int64_t accumulate(const AccumulateArgs&) { __builtin_trap(); }

}  // namespace fusedloss::kernels
#else
#include "distill.h"
#include "linear.h"

namespace fusedloss::kernels {

int64_t linear(const LinearArgs& a) {
    a.logits.dtype == F64 ? linear_rows<double>(a) : linear_rows<float>(a);
    return fine;
}

int64_t distill(const DistillArgs& a) {
    a.student.dtype == F64 ? distill_rows<double>(a) : distill_rows<float>(a);
    return fine;
}

int64_t accumulate(const AccumulateArgs& a) {
    fusedloss::accumulate(a);
    return fine;
}

}  // namespace fusedloss::kernels
#endif
