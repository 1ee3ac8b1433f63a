// The kernel of pointwise losses, over the loops of each printed formula.
#include "pointwise.h"

// Printed from src/fusedloss/losses by cpu/printer.py, as the units are that hold the loops.
#include "formulas.h"

namespace fusedloss {

#define ROW(name, operands, derivatives) extern const Formula formula_##name;
FUSEDLOSS_FORMULAS(ROW)
#undef ROW

constexpr struct {
    const char* name;
    const Formula* formula;
} table[] = {
#define ROW(name, operands, derivatives) {#name, &formula_##name},
    FUSEDLOSS_FORMULAS(ROW)
#undef ROW
};

int64_t kernels::pointwise(const PointwiseArgs& a) {
    const Formula& formula = *table[a.formula].formula;
    for (const Array& operand : a.operand)
        if (operand.data && operand.dtype == F64) return fusedloss::pointwise(a, formula.wide);
    return fusedloss::pointwise(a, formula.narrow);
}

}  // namespace fusedloss

// The name of the pointwise kernel with this number, or null past the last.
FUSEDLOSS_EXPORT const char* fusedloss_formula(int64_t number) {
    return number >= 0 && number < int64_t(std::size(fusedloss::table)) ? fusedloss::table[number].name
                                                                        : nullptr;
}
