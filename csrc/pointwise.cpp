// Kernels of pointwise losses: one of each printed formula.
#include "pointwise.h"

// Printed from src/fusedloss/losses by cpu/printer.py; written over math.h.
#include "formulas.h"

namespace fusedloss {

template <template <class> class Formula>
int64_t of_formula(const PointwiseArgs& a) {
    for (const Array& operand : a.operand)
        if (operand.data && operand.dtype == F64) return pointwise<Formula, double>(a);
    return pointwise<Formula, float>(a);
}

constexpr struct {
    const char* name;
    int64_t (*run)(const PointwiseArgs&);
} table[] = {
#define ROW(name) {#name, of_formula<formulas::name>},
    FUSEDLOSS_FORMULAS(ROW)
#undef ROW
};

int64_t kernels::pointwise(const PointwiseArgs& a) { return table[a.formula].run(a); }

}  // namespace fusedloss

// The name of the pointwise kernel with this number, or null past the last.
FUSEDLOSS_EXPORT const char* fusedloss_formula(int64_t number) {
    return number >= 0 && number < int64_t(std::size(fusedloss::table)) ? fusedloss::table[number].name
                                                                        : nullptr;
}
