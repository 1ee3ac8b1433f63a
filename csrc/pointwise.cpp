// Kernels of pointwise losses: one of each printed formula.
#include "pointwise.h"

// Printed from src/fusedloss/losses by cpu/printer.py; written over math.h.
#include "formulas.h"

namespace fusedloss {

constexpr struct {
    const char* name;
    const Loops<float>* narrow;
    const Loops<double>* wide;
} table[] = {
#define ROW(name) {#name, &loops_of<formulas::name, float>, &loops_of<formulas::name, double>},
    FUSEDLOSS_FORMULAS(ROW)
#undef ROW
};

int64_t kernels::pointwise(const PointwiseArgs& a) {
    const auto& row = table[a.formula];
    for (const Array& operand : a.operand)
        if (operand.data && operand.dtype == F64) return fusedloss::pointwise(a, *row.wide);
    return fusedloss::pointwise(a, *row.narrow);
}

}  // namespace fusedloss

// The name of the pointwise kernel with this number, or null past the last.
FUSEDLOSS_EXPORT const char* fusedloss_formula(int64_t number) {
    return number >= 0 && number < int64_t(std::size(fusedloss::table)) ? fusedloss::table[number].name
                                                                        : nullptr;
}
