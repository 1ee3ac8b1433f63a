// The C ABI: pointers, sizes and strides; nothing of torch or Python. Called through cpu/load.py.
#include "args.h"
#include "parallel.h"

using namespace fusedloss;

namespace {

using Kernel = int64_t (*)(const void*);
constexpr Kernel by_number[] = {
#define ROW(name, Args) [](const void* a) { return kernels::name(*static_cast<const Args*>(a)); },
    FUSEDLOSS_KERNELS(ROW)
#undef ROW
};

// Below it lies no memory of this process; most keep 4 GiB free there, the others their code from 4 MiB on.
uint64_t lowest_address() {
    const std::vector<char> block(64);
    constexpr uint64_t usual = uint64_t(1) << 32, least = uint64_t(1) << 22;
    return reinterpret_cast<uint64_t>(block.data()) >= usual ? usual : least;
}

}  // namespace

FUSEDLOSS_EXPORT void fusedloss_set_parallel_for(void* function) {
    parallel_for = reinterpret_cast<ParallelFor>(function);
}

FUSEDLOSS_EXPORT void fusedloss_advise_huge_pages(void* data, int64_t bytes) {
    advise_huge_pages(data, bytes);
}

// The kernel with this number; no exception may leave through the C ABI.
FUSEDLOSS_EXPORT int64_t fusedloss_run(int64_t kernel, const void* arguments) {
    try {
        return by_number[kernel](arguments);
    } catch (...) {
        return no_memory;
    }
}

// A call like an earlier one. `plan`: which kernel, how many words its arguments have, how many of these are
// pointers, which ones, and the arguments; `pointers` take their places.
FUSEDLOSS_EXPORT int64_t fusedloss_again(const int64_t* plan, const int64_t* pointers) {
    constexpr int64_t most = 256;
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
    return fusedloss_run(kernel, arguments);
}
