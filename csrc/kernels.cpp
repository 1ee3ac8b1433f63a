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

// Returned where scratch memory could not be had: no exception may leave through the C ABI.
constexpr int64_t no_memory = -2;
// Returned where a pointer is that of a tensor without memory: null, or an offset from it.
constexpr int64_t unreadable = -3;

// Below it lies no memory of this process; most keep 4 GiB free there, the others their code from 4 MiB on.
uint64_t lowest_address() {
    const std::unique_ptr<char[]> block(new char[64]);
    constexpr uint64_t usual = uint64_t(1) << 32, least = uint64_t(1) << 22;
    return reinterpret_cast<uint64_t>(block.get()) >= usual ? usual : least;
}

template <class F>
int64_t guarded(F&& f) {
    try {
        return f();
    } catch (...) {
        return no_memory;
    }
}

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

EXPORT int64_t fusedloss_pointwise(const fusedloss::PointwiseArgs* a) {
    return guarded([&] { return formulas[a->formula].run(*a); });
}

EXPORT int64_t fusedloss_cross_entropy(const fusedloss::RowsArgs* a) {
    const bool wide = any_double(a->input, a->probabilities ? a->target : a->input);
    return guarded(
        [&] { return wide ? fusedloss::cross_entropy<double>(*a) : fusedloss::cross_entropy<float>(*a); });
}

EXPORT int64_t fusedloss_linear(const fusedloss::LinearArgs* a) {
    return guarded([&] {
        a->logits.dtype == fusedloss::F64 ? fusedloss::linear_rows<double>(*a)
                                          : fusedloss::linear_rows<float>(*a);
        return int64_t(0);
    });
}

EXPORT int64_t fusedloss_accumulate(const fusedloss::AccumulateArgs* a) {
    fusedloss::accumulate(*a);
    return 0;
}

EXPORT int64_t fusedloss_distill(const fusedloss::DistillArgs* a) {
    return guarded([&] {
        a->student.dtype == fusedloss::F64 ? fusedloss::distill_rows<double>(*a)
                                           : fusedloss::distill_rows<float>(*a);
        return int64_t(0);
    });
}

EXPORT int64_t fusedloss_nll_loss(const fusedloss::RowsArgs* a) {
    const bool wide = any_double(a->input, a->grad);
    return guarded([&] { return wide ? fusedloss::nll<double>(*a) : fusedloss::nll<float>(*a); });
}

EXPORT int64_t fusedloss_triplet(const fusedloss::TripletArgs* a) {
    bool wide = false;
    for (const fusedloss::Matrix& input : a->input) wide |= input.dtype == fusedloss::F64;
    return guarded([&] { return wide ? fusedloss::triplet<double>(*a) : fusedloss::triplet<float>(*a); });
}

// A call like an earlier one. `plan`: which kernel, how many words its arguments have, how many of these are
// pointers, which ones, and the arguments; `pointers` take their places.
EXPORT int64_t fusedloss_again(const int64_t* plan, const int64_t* pointers) {
    constexpr int64_t most = 64;
    const int64_t kernel = plan[0], words = plan[1], count = plan[2];
    const int64_t* places = plan + 3;
    int64_t arguments[most];
    if (words > most) return no_memory;
    std::copy_n(places + count, words, arguments);
    static const uint64_t lowest = lowest_address();
    for (int64_t i = 0; i < count; ++i) {
        if (uint64_t(pointers[i]) < lowest) return unreadable;
        arguments[places[i]] = pointers[i];
    }
    const void* a = arguments;
    switch (kernel) {
        case 0: return fusedloss_pointwise(static_cast<const fusedloss::PointwiseArgs*>(a));
        case 1: return fusedloss_cross_entropy(static_cast<const fusedloss::RowsArgs*>(a));
        case 2: return fusedloss_nll_loss(static_cast<const fusedloss::RowsArgs*>(a));
        default: return fusedloss_triplet(static_cast<const fusedloss::TripletArgs*>(a));
    }
}
