// The kernel of losses of rows, for each printed definition.
#include "reduction.h"

// Printed from src/fusedloss/losses by cpu/reductions.py; written over math.h.
#include "reductions.h"

namespace fusedloss {

constexpr Reduction definitions[] = {
#define ROW(name) reduction_of<reductions::name>(#name),
    FUSEDLOSS_REDUCTIONS(ROW)
#undef ROW
};

int64_t kernels::reduction(const ReductionArgs& a) { return reduce(a, definitions[a.definition]); }

}  // namespace fusedloss

// The name of the loss of rows with this number, or null past the last.
FUSEDLOSS_EXPORT const char* fusedloss_reduction(int64_t number) {
    return number >= 0 && number < int64_t(std::size(fusedloss::definitions))
               ? fusedloss::definitions[number].name
               : nullptr;
}
