// Random tensors for the driver, and its calls on one thread and on a pool.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "../../csrc/convert.h"
#include "../../csrc/parallel.h"

// csrc/abi.cpp and csrc/pointwise.cpp
extern "C" void fusedloss_set_parallel_for(void* function);
extern "C" int64_t fusedloss_run(int64_t kernel, const void* arguments);
extern "C" int64_t fusedloss_again(const int64_t* plan, const int64_t* pointers);
extern "C" const char* fusedloss_formula(int64_t number);
extern "C" const char* fusedloss_reduction(int64_t number);

namespace {

using namespace fusedloss;
using Sizes = std::vector<int64_t>;

constexpr unsigned char untouched = 0xA5, gap = 0xFF;  // floats of gap bytes are NaN
constexpr int64_t any_type = -1;

void require(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "driver: %s\n", what.c_str());
    std::abort();
}

// As torch_parallel_for: stretches of at least `grain`, each on a thread.
int32_t pool(int64_t begin, int64_t end, int64_t grain, RangeFunction f, void* context) {
    const int64_t count = std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, 4);
    const int64_t each = (end - begin + count - 1) / count;
    std::vector<std::thread> threads;
    for (int64_t from = begin; from < end; from += each)
        threads.emplace_back([=] { f(from, std::min(from + each, end), context); });
    for (std::thread& t : threads) t.join();
    return 0;
}

int32_t alone(int64_t begin, int64_t end, int64_t, RangeFunction f, void* context) {
    f(begin, end, context);
    return 0;
}

thread_local ParallelFor chosen = alone;
int32_t choose(int64_t begin, int64_t end, int64_t grain, RangeFunction f, void* context) {
    return chosen(begin, end, grain, f, context);
}

class Random {
public:
    explicit Random(uint64_t seed) : engine(seed) {}
    int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
    bool chance(int percent) { return below(100) < percent; }
    double uniform(double low, double high) {
        return std::uniform_real_distribution<double>(low, high)(engine);
    }
    template <class T>
    T of(std::initializer_list<T> choices) {
        return choices.begin()[below(int64_t(choices.size()))];
    }
    std::mt19937_64 engine;
};

// The call whose arguments are `a`, as a repeated one whose pointers come apart: those of what it has.
template <class Args>
int64_t again(int64_t kernel, const Args& a, std::vector<size_t> offsets) {
    constexpr int64_t words = sizeof(Args) / 8;
    std::vector<int64_t> kept(words), places, pointers;
    std::memcpy(kept.data(), &a, sizeof(Args));
    for (const size_t offset : offsets) {
        if (!kept[offset / 8]) continue;
        pointers.push_back(std::exchange(kept[offset / 8], 1));
        places.push_back(int64_t(offset / 8));
    }
    std::vector<int64_t> plan{kernel, words, int64_t(places.size())};
    plan.insert(plan.end(), places.begin(), places.end());
    plan.insert(plan.end(), kept.begin(), kept.end());
    return fusedloss_again(plan.data(), pointers.data());
}

// Elements of a call: now and then enough for several threads.
int64_t budget(Random& r) { return r.chance(8) ? 100000 : 4000; }

// A size near the borders of vectors and blocks, or small.
int64_t size(Random& r, int64_t most) {
    if (r.chance(5)) return 0;
    if (r.chance(50)) return 1 + r.below(std::min<int64_t>(most, 20));
    const int64_t near = r.of<int64_t>({16, 64, 256, 1024, 2048, 4096, 33000});
    return std::clamp<int64_t>(near - 2 + r.below(5), 0, most);
}

std::pair<int64_t, int64_t> rows_of_classes(Random& r, int64_t most_classes) {
    const int64_t most = budget(r), classes = std::max<int64_t>(1, size(r, std::min(most, most_classes)));
    return {size(r, most / classes), classes};
}

struct Tensor {
    int64_t dtype = F32;
    Sizes sizes, strides;
    int64_t bytes = 0;
    unsigned char fill = 0;
    std::unique_ptr<unsigned char[]> memory;

    void* data() const { return bytes ? memory.get() : nullptr; }
    explicit operator bool() const { return bytes > 0; }

    template <class F>
    void each(F&& f) const {
        if (!bytes) return;
        const int64_t count =
            std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<int64_t>());
        for (int64_t i = 0; i < count; ++i) {
            int64_t rest = i, offset = 0;
            for (size_t d = sizes.size(); d-- > 0;) {
                offset += rest % sizes[d] * strides[d];
                rest /= sizes[d];
            }
            f(i, offset);
        }
    }

    void refill(unsigned char with) {
        fill = with;
        std::fill_n(memory.get(), bytes, with);
    }

    Tensor copy() const {
        Tensor other{dtype, sizes, strides, bytes, fill, nullptr};
        other.memory.reset(new unsigned char[size_t(bytes)]);
        std::copy_n(memory.get(), bytes, other.memory.get());
        return other;
    }

    // Whether each byte belongs to an element.
    std::vector<char> owned() const {
        std::vector<char> bytes_of(size_t(bytes), 0);
        const int64_t width = size_of(dtype);
        each(
            [&](int64_t, int64_t offset) { std::fill_n(bytes_of.begin() + offset * width, width, char(1)); });
        return bytes_of;
    }

    void check_finite(const std::string& name) const {
        each([&](int64_t i, int64_t offset) {
            require(std::isfinite(load_one(data(), dtype, offset)),
                    name + ": not finite at " + std::to_string(i));
        });
    }
};

enum Layout { DENSE, ANY, EXPANDED };  // ANY: dimensions in any order, with gaps; EXPANDED: stride 0 too

Tensor make(Random& r, int64_t dtype, const Sizes& sizes, Layout layout, unsigned char fill) {
    Tensor t{dtype, sizes, Sizes(sizes.size()), 0, fill, nullptr};
    std::vector<size_t> order(sizes.size());
    std::iota(order.begin(), order.end(), size_t(0));
    if (layout != DENSE && r.chance(50)) std::shuffle(order.begin(), order.end(), r.engine);
    const bool gaps = layout != DENSE && r.chance(50);
    int64_t step = gaps ? 1 + r.below(3) : 1, last = 0;
    for (size_t k = order.size(); k-- > 0;) {
        const size_t d = order[k];
        const bool expand = layout == EXPANDED && r.chance(20);
        t.strides[d] = expand ? 0 : step;
        last += t.strides[d] * std::max<int64_t>(sizes[d] - 1, 0);
        if (!expand) step = step * std::max<int64_t>(sizes[d], 1) + (gaps ? r.below(3) : 0);
    }
    if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return t;
    t.bytes = (last + 1) * size_of(dtype);
    t.memory.reset(new unsigned char[size_t(t.bytes)]);
    std::fill_n(t.memory.get(), t.bytes, fill);
    return t;
}

Tensor floats(Random& r, int64_t dtype, const Sizes& sizes, Layout layout, double low, double high,
              bool special) {
    Tensor t = make(r, dtype, sizes, layout, gap);
    const double specials[] = {INFINITY, -INFINITY, NAN, 0.0, -0.0, 1.0, 5e-324, 1e-45, 1e38, -1e308, 1e5};
    t.each([&](int64_t, int64_t at) {
        const bool odd = special && r.chance(20);
        store_one(t.data(), dtype, at, odd ? specials[r.below(11)] : r.uniform(low, high));
    });
    return t;
}

int64_t float_type(Random& r) { return r.of<int64_t>({F32, F32, F64, BF16, F16}); }

// In so many of a hundred calls, of any type where none is given. It draws both itself: in what order the
// arguments of a call are evaluated differs between ABIs.
Tensor output(Random& r, int percent, const Sizes& sizes, Layout layout, int64_t dtype = any_type) {
    const bool present = r.chance(percent);
    if (dtype == any_type) dtype = float_type(r);
    return present ? make(r, dtype, sizes, layout, untouched) : Tensor{};
}

// Runs the call on one thread and on the pool, over outputs of different bytes: what it leaves in an element
// must be the same, and so was written; what lies between the elements must be as it was. A refusal by
// `checked` kernels writes nothing.
template <class F>
int64_t on_both(const std::string& name, bool checked, F&& call, const std::vector<Tensor*>& outputs) {
    std::vector<Tensor> first;
    chosen = alone;
    const int64_t result = call();
    for (Tensor* t : outputs) {
        first.push_back(t->copy());
        t->refill(t->fill == 0 ? 0 : static_cast<unsigned char>(~t->fill));
    }
    chosen = pool;
    require(call() == result, name + ": the pool returns something else");
    for (size_t k = 0; k < first.size(); ++k) {
        const Tensor &a = first[k], &b = *outputs[k];
        const std::vector<char> owned = a.owned();
        for (int64_t i = 0; i < a.bytes; ++i) {
            const auto x = a.memory[size_t(i)], y = b.memory[size_t(i)];
            const std::string where = name + " output " + std::to_string(k) + ", byte " + std::to_string(i);
            if (!owned[size_t(i)] || (checked && result >= 0))
                require(x == a.fill && y == b.fill, where + ": written to");
            else if (result < 0)
                require(x == y, where + ": not written, or otherwise by the pool");
        }
    }
    return result;
}

Grid grid(const Tensor& t) {
    Grid g{t.data(), t.dtype, {}};
    std::copy(t.strides.begin(), t.strides.end(), g.stride);
    return g;
}

// One value a row: no class dimension.
Grid row_grid(const Tensor& t) {
    if (!t) return {};
    return {t.data(), t.dtype, {t.strides[0], 0, t.strides[1]}};
}

Matrix matrix(const Tensor& t) {
    return t ? Matrix{t.data(), t.dtype, t.strides[0], t.strides[1]} : Matrix{};
}

}  // namespace
