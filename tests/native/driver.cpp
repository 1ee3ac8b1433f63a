// Random calls of the C ABI for the sanitizers and valgrind: every kernel, type, layout and size around the
// blocks, on one thread and on a pool of its own. Each tensor is one allocation of exactly its size; outputs
// are checked for bytes that no result belongs to, inputs have NaN between their elements, and the pool
// must give the bits of one thread. Usage: driver SEED CALLS CALLERS
#include "driver.h"
#include "heads.h"
#include "labelled.h"

#include "formulas.h"
#include "reductions.h"

namespace {

constexpr struct {
    const char* name;
    int operands, derivatives;
} pointwise_kernels[] = {
#define ROW(name, operands, derivatives) {#name, operands, derivatives},
    FUSEDLOSS_FORMULAS(ROW)
#undef ROW
};

void pointwise_call(Random& r) {
    const int64_t number = r.below(int64_t(std::size(pointwise_kernels)));
    const auto& kernel = pointwise_kernels[number];
    const std::string name = fusedloss_formula(number);
    require(name == kernel.name, "the formulas are numbered otherwise");
    Sizes sizes;
    for (int64_t d = r.below(4), most = budget(r); d >= 0; --d) {
        sizes.push_back(size(r, most));
        most = std::max<int64_t>(1, most / std::max<int64_t>(sizes.back(), 1));
    }
    const int64_t numel = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>());
    const bool dense = r.chance(40), special = r.chance(30), reduced = r.chance(50);
    const Layout in = dense ? DENSE : EXPANDED, out = dense ? DENSE : ANY;
    if (dense) sizes = {numel};

    Tensor inputs[formula_operands], multipliers[2];
    for (int k = 0; k < kernel.operands; ++k)
        inputs[k] = floats(r, float_type(r), sizes, in, 0.05, 0.95, special);
    for (Tensor& m : multipliers)
        if (r.chance(40)) m = floats(r, float_type(r), sizes, in, 0.1, 2, special);
    Tensor loss = output(r, reduced ? 0 : 70, sizes, out);
    Tensor total = output(r, reduced ? 100 : 0, {}, DENSE);
    Tensor grads[formula_operands];
    for (int k = 0; k < kernel.derivatives; ++k) grads[k] = output(r, 60, sizes, out);

    const bool flat = dense;
    const size_t ndim = flat ? 1 : sizes.size();
    std::vector<const Tensor*> arrays;
    std::vector<Tensor*> results = {&loss, &total};
    for (const Tensor& t : inputs) arrays.push_back(&t);
    for (const Tensor& t : multipliers) arrays.push_back(&t);
    arrays.push_back(&loss);
    for (Tensor& t : grads) arrays.push_back(&t), results.push_back(&t);
    std::vector<int64_t> memory(sizeof(PointwiseArgs) / 8 + ndim * (arrays.size() + 1));
    auto& a = *reinterpret_cast<PointwiseArgs*>(memory.data());
    a.formula = number;
    a.numel = numel;
    a.ndim = int64_t(ndim);
    const auto array = [](const Tensor& t) { return Array{t.data(), t.dtype}; };
    for (int k = 0; k < formula_operands; ++k) a.operand[k] = array(inputs[k]), a.grad[k] = array(grads[k]);
    for (int k = 0; k < 2; ++k) a.multiplier[k] = array(multipliers[k]);
    a.loss = array(loss);
    a.total = array(total);
    a.denominator = reduced ? double(numel) : 1;
    a.grad_scale = numel ? 1 / a.denominator : 0;
    std::fill_n(a.numbers, formula_numbers, 1.0);
    int64_t* layout = memory.data() + sizeof(PointwiseArgs) / 8;
    std::copy(sizes.begin(), sizes.end(), layout);
    for (size_t s = 0; s < arrays.size(); ++s)
        for (size_t d = 0; d < ndim; ++d)
            layout[ndim * (s + 1) + d] = arrays[s]->strides.size() ? arrays[s]->strides[d] : flat ? 1 : 0;

    const int64_t outside = on_both(name, false, [&] { return fusedloss_run(POINTWISE, &a); }, results);
    require(outside < 0 || special, name + ": refused an element of the domain");
    if (outside >= 0 || special || !numel) return;
    for (const Tensor* t : results)
        if (t != &total || t->dtype != F16) t->check_finite(name);
}

void rows_call(Random& r, bool nll) {
    RowsArgs a{};
    const int64_t most = budget(r);
    a.c = std::max<int64_t>(1, size(r, std::min<int64_t>(most, 4200)));
    a.d = r.chance(30) ? 1 : size(r, most / a.c);
    a.n = size(r, most / (a.c * std::max<int64_t>(a.d, 1)));
    if (r.chance(30)) a.d = std::exchange(a.n, 1);
    a.probabilities = !nll && r.chance(40);
    a.mean = r.chance(50);
    a.denominator = r.chance(30) ? 7.5 : 0;
    a.ignore_index = r.chance(50) ? r.below(a.c) : -100;
    a.smoothing = nll || r.chance(50) ? 0.0 : r.uniform(0, 1);
    const bool special = r.chance(20), reduced = r.chance(60), outside = !a.probabilities && r.chance(10);
    const Sizes whole = {a.n, a.c, a.d}, rows = {a.n, a.d};
    const Layout in = r.chance(40) ? DENSE : EXPANDED;

    Tensor input = floats(r, float_type(r), whole, in, -4, 4, special), target;
    if (a.probabilities) {
        target = floats(r, float_type(r), whole, in, 0, 1, special);
    } else {
        const auto type = r.of<int64_t>({I64, I64, I32, I16, I8, U8, U16, U32, U64});
        target = make(r, type, rows, in, gap);
        const int64_t labels = type == I8 ? 127 : type == U8 ? 255 : 4200;
        target.each([&](int64_t, int64_t offset) {
            int64_t y = r.below(std::min(a.c, labels));
            if (outside && r.chance(5)) y = type == I8 || a.c > 200 ? -1 : a.c;
            unsigned char* to = target.memory.get() + offset * size_of(type);
            std::memcpy(to, &y, size_t(size_of(type)));  // little-endian
        });
    }
    const bool wide = input.dtype == F64 || (a.probabilities && target.dtype == F64);
    Tensor weight, incoming;
    if (r.chance(40)) weight = floats(r, wide ? F64 : F32, {a.c}, DENSE, 0.1, 2, special);
    if (r.chance(40)) incoming = floats(r, float_type(r), rows, in, -1, 1, special);
    Tensor loss = output(r, reduced ? 0 : 100, rows, DENSE);
    Tensor total = output(r, reduced ? 100 : 0, {}, DENSE);
    const Layout out = r.chance(50) ? DENSE : ANY;
    Tensor grad = output(r, 70, whole, out, nll ? input.dtype : any_type);
    if (nll) grad.refill(0);  // the kernel of nll writes the target's entry alone
    Tensor grad_target = output(r, a.probabilities ? 50 : 0, whole, out);
    a.input = grid(input);
    a.target = a.probabilities ? grid(target) : row_grid(target);
    a.weight = {weight.data(), weight.dtype, {}};
    a.incoming = row_grid(incoming);
    a.loss = row_grid(loss);
    a.total = {total.data(), total.dtype, {}};
    a.grad = grid(grad);
    a.grad_target = grid(grad_target);

    const std::string name = nll ? "nll_loss" : "cross_entropy";
    const Number kernel = nll ? NLL_LOSS : CROSS_ENTROPY;
    const bool repeated = r.chance(30);
    const auto run = [&] {
        if (repeated)
            return again(
                kernel, a,
                {offsetof(RowsArgs, input), offsetof(RowsArgs, target), offsetof(RowsArgs, total),
                 offsetof(RowsArgs, grad), offsetof(RowsArgs, grad_target), offsetof(RowsArgs, incoming)});
        return fusedloss_run(kernel, &a);
    };
    const int64_t bad = on_both(name, true, run, {&loss, &total, &grad, &grad_target});
    require(bad < 0 || outside, name + ": refused a class index in range");
    // The mean over no row is NaN.
    if (bad >= 0 || special || a.ignore_index >= 0 || a.n * a.d == 0) return;
    for (const Tensor* t : {&loss, &total, &grad, &grad_target})
        if (t != &total || t->dtype != F16) t->check_finite(name);
}

constexpr struct {
    int operands;
    bool label;
} reduction_kernels[] = {
#define ROW(name) {reductions::name::operands, reductions::name::label},
    FUSEDLOSS_REDUCTIONS(ROW)
#undef ROW
};

void reduction_call(Random& r) {
    ReductionArgs a{};
    const int64_t most = budget(r);
    a.features = size(r, std::min<int64_t>(most, 5000));
    a.rows = size(r, most / std::max<int64_t>(a.features, 1));
    for (; fusedloss_reduction(a.definition + 1) && r.chance(50);) ++a.definition;
    const double p = r.of<double>({1, 2, 2, 3, 0.7, INFINITY}), margin = r.uniform(0.1, 3);
    const double numbers[] = {p, 1e-6, margin};
    std::copy_n(numbers, 3, a.numbers);
    const bool special = r.chance(20), reduced = r.chance(50);
    a.denominator = reduced ? double(std::max<int64_t>(a.rows, 1)) : 1;
    a.grad_scale = 1 / a.denominator;
    const Sizes whole = {a.rows, a.features}, column = {a.rows, 1};
    const auto [operands, label] = reduction_kernels[a.definition];
    Tensor inputs[3], grads[3], incoming;
    for (int k = 0; k < operands; ++k) inputs[k] = floats(r, float_type(r), whole, EXPANDED, -2, 2, special);
    if (label) inputs[operands] = floats(r, float_type(r), column, EXPANDED, -1, 1, special);
    if (r.chance(40)) incoming = floats(r, float_type(r), column, EXPANDED, -1, 1, special);
    Tensor loss = output(r, reduced ? 0 : 100, column, DENSE);
    Tensor total = output(r, reduced ? 100 : 0, {1, 1}, DENSE);
    for (int k = 0; k < operands; ++k) grads[k] = output(r, 60, whole, ANY);
    for (int k = 0; k < 3; ++k) a.input[k] = matrix(inputs[k]), a.grad[k] = matrix(grads[k]);
    a.incoming = matrix(incoming);
    a.loss = matrix(loss);
    a.total = matrix(total);
    const bool repeated = r.chance(30);
    const auto run = [&] {
        return repeated ? again(REDUCTION, a,
                                {offsetof(ReductionArgs, input[0]), offsetof(ReductionArgs, input[1]),
                                 offsetof(ReductionArgs, input[2]), offsetof(ReductionArgs, total),
                                 offsetof(ReductionArgs, grad[0]), offsetof(ReductionArgs, grad[1]),
                                 offsetof(ReductionArgs, grad[2])})
                        : fusedloss_run(REDUCTION, &a);
    };
    on_both("reduction", false, run, {&loss, &total, &grads[0], &grads[1], &grads[2]});
    if (special || p < 1) return;
    for (const Tensor* t : {&loss, &total, &grads[0], &grads[1], &grads[2]})
        if (t != &total || t->dtype != F16) t->check_finite("reduction");
}

void calls(uint64_t seed, int64_t count) {
    Random r(seed);
    for (int64_t k = 0; k < count; ++k) {
        switch (r.below(10)) {
            case 0: pointwise_call(r); break;
            case 1: rows_call(r, false); break;
            case 2: rows_call(r, true); break;
            case 3: linear_call(r); break;
            case 4: distill_call(r); break;
            case 5: ctc_call(r); break;
            case 6: margins_call(r); break;
            case 7: dice_call(r); break;
            case 8: head_rows_call(r); break;
            default: reduction_call(r); break;
        }
    }
    drawn ^= r.engine();
}

}  // namespace

int main(int argc, char** argv) {
    require(argc == 4, "usage: driver SEED CALLS CALLERS");
    const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
    const int64_t count = std::atoll(argv[2]), callers = std::atoll(argv[3]);
    fusedloss_set_parallel_for(reinterpret_cast<void*>(&choose));
    std::vector<std::thread> threads;
    for (int64_t k = 1; k < callers; ++k)
        threads.emplace_back([=] { calls(seed + uint64_t(k), count / callers); });
    calls(seed, count / callers);
    for (std::thread& t : threads) t.join();
    std::printf("driver: %lld calls of the kernels, seed %llu, %lld at once, drawn %016llx: no fault\n",
                (long long)count, (unsigned long long)seed, (long long)callers, (unsigned long long)drawn);
    return 0;
}
