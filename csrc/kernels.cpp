// The C ABI: pointers, sizes and strides; nothing of torch or Python. Called through cpu/load.py.
#include <cstdint>
#include <memory>

#include "distill.h"
#include "gather.h"
#include "linear.h"
#include "math.h"
#include "math_probe.h"
#include "pointwise.h"
#include "rows.h"
#include "triplet.h"

// Printed from src/fusedloss/losses by cpu/printer.py; written over math.h.
#include "formulas.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

bool any_double(const fusedloss::Grid& a, const fusedloss::Grid& b) {
    return (a.data && a.dtype == fusedloss::F64) || (b.data && b.dtype == fusedloss::F64);
}

template <template <class> class Formula>
int64_t pointwise(const fusedloss::PointwiseArgs& a) {
    for (const fusedloss::Array& input : a.input)
        if (input.data && input.dtype == fusedloss::F64) return fusedloss::pointwise<Formula, double>(a);
    return fusedloss::pointwise<Formula, float>(a);
}

constexpr struct {
    const char* name;
    int64_t (*run)(const fusedloss::PointwiseArgs&);
} formulas[] = {
#define ROW(name) {#name, pointwise<fusedloss::formulas::name>},
    FUSEDLOSS_FORMULAS(ROW)
#undef ROW
};

// Below it lies no memory of this process; most keep 4 GiB free there, the others their code from 4 MiB on.
uint64_t lowest_address() {
    const std::unique_ptr<char[]> block(new char[64]);
    constexpr uint64_t usual = uint64_t(1) << 32, least = uint64_t(1) << 22;
    return reinterpret_cast<uint64_t>(block.get()) >= usual ? usual : least;
}

using Kernel = int64_t (*)(const void*);
constexpr Kernel by_number[] = {
#define ROW(name, Args) \
    [](const void* a) { return fusedloss::kernels::name(*static_cast<const fusedloss::Args*>(a)); },
    FUSEDLOSS_KERNELS(ROW)
#undef ROW
};

}  // namespace

EXPORT void fusedloss_set_parallel_for(void* function) {
    fusedloss::parallel_for = reinterpret_cast<fusedloss::ParallelFor>(function);
}

EXPORT void fusedloss_advise_huge_pages(void* data, int64_t bytes) {
    fusedloss::advise_huge_pages(data, bytes);
}

// The name of the pointwise kernel with this number, or null past the last.
EXPORT const char* fusedloss_formula(int64_t number) {
    constexpr int64_t count = sizeof(formulas) / sizeof(formulas[0]);
    return number >= 0 && number < count ? formulas[number].name : nullptr;
}

namespace fusedloss::kernels {

int64_t pointwise(const PointwiseArgs& a) { return ::formulas[a.formula].run(a); }

int64_t cross_entropy(const RowsArgs& a) {
    const bool wide = any_double(a.input, a.probabilities ? a.target : a.input);
    return wide ? fusedloss::cross_entropy<double>(a) : fusedloss::cross_entropy<float>(a);
}

int64_t nll_loss(const RowsArgs& a) { return any_double(a.input, a.grad) ? nll<double>(a) : nll<float>(a); }

int64_t triplet(const TripletArgs& a) {
    bool wide = false;
    for (const Matrix& input : a.input) wide |= input.dtype == F64;
    return wide ? fusedloss::triplet<double>(a) : fusedloss::triplet<float>(a);
}

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

// The kernel with this number; no exception may leave through the C ABI.
EXPORT int64_t fusedloss_run(int64_t kernel, const void* arguments) {
    try {
        return by_number[kernel](arguments);
    } catch (...) {
        return fusedloss::no_memory;
    }
}

// A call like an earlier one. `plan`: which kernel, how many words its arguments have, how many of these are
// pointers, which ones, and the arguments; `pointers` take their places.
EXPORT int64_t fusedloss_again(const int64_t* plan, const int64_t* pointers) {
    constexpr int64_t most = 64;
    const int64_t kernel = plan[0], words = plan[1], count = plan[2];
    const int64_t* places = plan + 3;
    int64_t arguments[most];
    if (words > most) return fusedloss::no_memory;
    std::copy_n(places + count, words, arguments);
    static const uint64_t lowest = lowest_address();
    for (int64_t i = 0; i < count; ++i) {
        if (uint64_t(pointers[i]) < lowest) return fusedloss::unreadable;
        arguments[places[i]] = pointers[i];
    }
    return fusedloss_run(kernel, arguments);
}
