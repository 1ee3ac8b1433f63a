// Kernels of heads whose logits never exist as a whole.
#if defined(FUSEDLOSS_NARROW)
// Whatever their size, heads run the other library's.
#include "args.h"

namespace fusedloss::kernels {

int64_t linear(const LinearArgs&) { __builtin_trap(); }
int64_t distill(const DistillArgs&) { __builtin_trap(); }
int64_t merge(const MergeArgs&) { __builtin_trap(); }
int64_t merge_divergences(const MergeArgs&) { __builtin_trap(); }
int64_t accumulate(const AccumulateArgs&) { __builtin_trap(); }
int64_t head_rows(const HeadRowsArgs&) { __builtin_trap(); }
int64_t head_results(const HeadResultsArgs&) { __builtin_trap(); }

}  // namespace fusedloss::kernels
#else
#include "distill.h"
#include "head_rows.h"
#include "linear.h"

namespace fusedloss::kernels {

int64_t linear(const LinearArgs& a) {
    a.logits.dtype == F64 ? linear_rows<double>(a) : linear_rows<float>(a);
    return count_beyond(a.beyond, a.n);
}

int64_t distill(const DistillArgs& a) {
    a.student.dtype == F64 ? distill_rows<double>(a) : distill_rows<float>(a);
    return count_beyond(a.beyond, a.n);
}

int64_t merge(const MergeArgs& a) {
    merge_sums(a);
    return fine;
}

int64_t merge_divergences(const MergeArgs& a) {
    fusedloss::merge_divergences(a);
    return fine;
}

int64_t accumulate(const AccumulateArgs& a) {
    fusedloss::accumulate(a);
    return fine;
}

int64_t head_rows(const HeadRowsArgs& a) { return fusedloss::head_rows(a); }

int64_t head_results(const HeadResultsArgs& a) { return fusedloss::head_results(a); }

}  // namespace fusedloss::kernels
#endif
