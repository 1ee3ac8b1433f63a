// Random calls of the kernels of heads, of all their classes and of shards of them.
#pragma once
#include "driver.h"

namespace {

// Logits of rows with gaps between them, that a kernel may overwrite: `fill` brings them back.
struct Head {
    Tensor source, logits, low, bias;

    // The type of a teacher's bias is that of its student's logits, by which the kernel computes.
    Head(Random& r, int64_t n, int64_t c, bool special, const Head* student = nullptr)
        : source(floats(r, float_type(r), {n, c}, DENSE, -4, 4, special)),
          logits(make(r, source.dtype, {n, c + r.below(3)}, DENSE, untouched)) {
        if (source.dtype == BF16 && r.chance(60))
            low = floats(r, BF16, {n, logits.strides[0]}, DENSE, -0.01, 0.01, special);
        const bool wide = (student ? student : this)->source.dtype == F64;
        if (r.chance(40)) bias = floats(r, wide ? F64 : F32, {c}, DENSE, -1, 1, special);
        logits.sizes = source.sizes;
    }
    Logits from(int64_t c) const {
        const void* lost = low ? at(low.data(), low.dtype, c) : nullptr;
        const void* added = bias ? at(bias.data(), bias.dtype, c) : nullptr;
        return {at(logits.data(), logits.dtype, c), lost, added, logits.dtype, logits.strides[0]};
    }
    void fill() const {
        const int64_t width = size_of(logits.dtype), row = source.sizes[1] * width;
        for (int64_t n = 0; row && n < source.sizes[0]; ++n)
            std::copy_n(source.memory.get() + n * row, row,
                        logits.memory.get() + n * logits.strides[0] * width);
    }
};

Tensor labels(Random& r, int64_t n, int64_t classes) {
    Tensor t = make(r, I64, {n}, DENSE, gap);
    for (int64_t k = 0; k < n; ++k) static_cast<int64_t*>(t.data())[k] = r.below(classes);
    return t;
}

void linear_call(Random& r) {
    LinearArgs a{};
    std::tie(a.n, a.c) = rows_of_classes(r, 4200);
    a.differentiate = r.chance(50);
    a.smoothing = r.chance(50) ? 0.0 : r.uniform(0, 1);
    a.z_loss = r.chance(30) ? 0.01 : 0.0;
    a.softcap = r.chance(30) ? 3.0 : 0.0;
    a.logit_scale = r.chance(30) ? -0.7 : 1.0;
    const bool special = r.chance(20), probabilities = r.chance(40);
    const Sizes whole = {a.n, a.c};
    Head head(r, a.n, a.c, special);
    Tensor& logits = head.logits;
    Tensor target, label, weight, grad_target;
    if (probabilities) {
        target = floats(r, float_type(r), whole, EXPANDED, 0, 1, special);
        grad_target = output(r, a.differentiate ? 50 : 0, whole, ANY);
    } else {
        label = labels(r, a.n, a.c);
    }
    if (r.chance(40)) weight = floats(r, logits.dtype == F64 ? F64 : F32, {a.c}, DENSE, 0.1, 2, special);
    Tensor results[4], incoming[3], sums = make(r, F64, {a.n, 8}, DENSE, gap);
    const auto doubles = [](const Tensor& t) { return static_cast<double*>(t.data()); };
    for (Tensor& t : results) t = output(r, 70, {a.n}, DENSE, F64);
    for (Tensor& t : incoming)
        if (a.differentiate && r.chance(60)) t = floats(r, F64, {a.n}, DENSE, -1, 1, special);
    const auto grid_of = [](const Tensor& t) {
        return t ? Grid{t.data(), t.dtype, {t.strides[0], t.strides[1], 0}} : Grid{};
    };
    a.label = static_cast<const int64_t*>(label.data());
    a.target = grid_of(target);
    a.weight = weight.data();
    a.incoming = doubles(incoming[0]);
    a.incoming_lse = doubles(incoming[1]);
    a.incoming_entropy = doubles(incoming[2]);
    a.sums = doubles(sums);
    a.loss = doubles(results[0]);
    a.lse = doubles(results[1]);
    a.entropy = doubles(results[2]);
    a.correct = doubles(results[3]);
    a.grad_target = grid_of(grad_target);
    if (!label && !target) return;  // no rows

    const bool shards = r.chance(30);  // of several processes
    const int64_t parts = a.differentiate && !shards ? 1 : 1 + r.below(std::min<int64_t>(a.c, 3));
    Tensor gathered = make(r, F64, {parts, a.n, 8}, DENSE, gap);
    const auto part = [&](int64_t k, bool gathers, bool finishes) {
        a.first = a.c * k / parts;
        a.columns = a.c * (k + 1) / parts - a.first;
        a.begin = gathers && (shards || k == 0);
        a.finish = finishes;
        a.given = !gathers;
        a.sums = doubles(sums);
        if (shards && gathers) a.sums = doubles(gathered) + k * a.n * 8;
        a.logits = head.from(a.first);
        require(fusedloss_run(LINEAR, &a) == fine, "linear: no memory");
    };
    const auto run = [&] {
        head.fill();
        for (int64_t k = 0; k < parts; ++k) part(k, true, !shards && k + 1 == parts);
        if (!shards) return int64_t(-1);
        const MergeArgs merge{a.n, parts, label ? 1 : 0, 1.0, doubles(gathered), doubles(sums)};
        require(fusedloss_run(MERGE, &merge) == fine, "merge: no memory");
        for (int64_t k = 0; k < parts; ++k) part(k, false, true);
        return int64_t(-1);
    };
    on_both("linear", false, run,
            {&logits, &results[0], &results[1], &results[2], &results[3], &grad_target});
    if (special) return;
    for (const Tensor* t : {&logits, &results[0], &results[1], &results[2], &grad_target})
        t->check_finite("linear");
}

void distill_call(Random& r) {
    DistillArgs a{};
    std::tie(a.n, a.c) = rows_of_classes(r, 4200);
    a.of_teacher = r.chance(66);
    a.of_student = !a.of_teacher || r.chance(50);
    a.differentiate = r.chance(50);
    a.beta = r.uniform(0.1, 0.9);
    a.temperature = r.chance(50) ? 1.0 : 2.5;
    a.soft_weight = 0.75;
    a.hard_weight = 0.25;
    const bool special = r.chance(20);
    Head student(r, a.n, a.c, special), teacher(r, a.n, a.c, special, &student);
    a.student = student.from(0);
    a.teacher = teacher.from(0);
    a.softcap = r.chance(30) ? 3.0 : 0.0;
    a.teacher_softcap = r.chance(30) ? 3.0 : 0.0;
    Tensor label, incoming, loss = make(r, F64, {a.n}, DENSE, untouched);
    if (r.chance(50)) label = labels(r, a.n, a.c);
    if (r.chance(50)) incoming = floats(r, F64, {a.n}, DENSE, -1, 1, special);
    a.label = static_cast<const int64_t*>(label.data());
    a.incoming = static_cast<const double*>(incoming.data());
    a.loss = static_cast<double*>(loss.data());
    teacher.fill();
    const bool shards = r.chance(30);  // of several processes
    const int64_t classes = a.c, parts = shards ? 1 + r.below(std::min<int64_t>(a.c, 3)) : 1;
    Tensor gathered = make(r, F64, {parts, a.n, softmax_sums}, DENSE, gap);
    Tensor merged = make(r, F64, {a.n, divergence_sums}, DENSE, gap), small = make(r, I64, {a.n}, DENSE, gap);
    const auto doubles = [](const Tensor& t) { return static_cast<double*>(t.data()); };
    const auto part = [&](int64_t k, Phase phase, double* sums) {
        a.phase = phase;
        a.first = classes * k / parts;
        a.c = classes * (k + 1) / parts - a.first;
        a.student = student.from(a.first);
        a.teacher = teacher.from(a.first);
        a.sums = sums;
        a.beyond = phase == REFINE ? static_cast<int64_t*>(small.data()) : nullptr;
        const int64_t found = fusedloss_run(DISTILL, &a);
        require(found == fine || (phase == REFINE && found > 0), "distill: no memory");
    };
    // Columns [from, to) of what the phase makes of each part, added up.
    const auto add_up = [&](Phase phase, int64_t from, int64_t to) {
        std::vector<double> own, total(size_t(a.n * divergence_sums));
        for (int64_t k = 0; k < parts; ++k) {
            own.assign(doubles(merged), doubles(merged) + a.n * divergence_sums);
            part(k, phase, own.data());
            for (size_t i = 0; i < own.size(); ++i) total[i] += own[i];
        }
        for (int64_t i = 0; i < a.n * divergence_sums; ++i)
            if (i % divergence_sums >= from && i % divergence_sums < to)
                doubles(merged)[i] = total[size_t(i)];
    };
    const auto run = [&] {
        student.fill();
        if (!shards) {
            require(fusedloss_run(DISTILL, &a) == fine, "distill: no memory");
            return int64_t(-1);
        }
        for (int64_t k = 0; k < parts; ++k) {
            std::vector<double> own(size_t(a.n * divergence_sums));
            part(k, GATHER, own.data());
            for (int64_t n = 0; n < a.n; ++n)
                std::copy_n(&own[size_t(n * divergence_sums)], softmax_sums,
                            doubles(gathered) + (k * a.n + n) * softmax_sums);
        }
        const MergeArgs merge{a.n, parts, 0, a.temperature, doubles(gathered), doubles(merged)};
        require(fusedloss_run(MERGE_DIVERGENCES, &merge) == fine, "merge_divergences: no memory");
        add_up(COMPARE, softmax_sums, softmax_sums + 2);
        add_up(REFINE, softmax_sums + 2, divergence_sums);
        for (int64_t k = 0; k < parts; ++k) part(k, FINISH, doubles(merged));
        return int64_t(-1);
    };
    on_both("distill", false, run, {&student.logits, &loss});
    if (special) return;
    student.logits.check_finite("distill");
    loss.check_finite("distill");
}

void head_rows_call(Random& r) {
    HeadRowsArgs a{};
    a.n = size(r, 600);
    a.classes = 1 + r.below(40);
    a.ignore_index = r.below(a.classes);
    a.divide = r.chance(50);
    a.sign = r.chance(50) ? 1 : -1;
    if (!a.n) return;
    const auto some_of = [&](int64_t n, double low, double high) {
        return r.chance(50) ? floats(r, float_type(r), {n}, DENSE, low, high, false) : Tensor();
    };
    const auto array = [](const Tensor& t) { return t ? Array{t.data(), t.dtype} : Array{}; };
    const Tensor label = labels(r, a.n, a.classes), weight = some_of(a.classes, 0.1, 2);
    const Tensor share = some_of(a.n, 0, 1), incoming = some_of(a.n, -1, 1);
    a.label = array(label), a.weight = array(weight), a.share = array(share), a.incoming = array(incoming);
    a.incoming_stride = bool(incoming);
    const Tensor rows = make(r, I64, {head_words * a.n + 1}, DENSE, gap);
    HeadResultsArgs b{};
    b.n = a.n;
    b.reduced = r.chance(50);
    b.sign = a.sign;
    Tensor out = make(r, float_type(r), {b.reduced ? 1 : a.n}, DENSE, untouched);
    b.rows = a.rows = static_cast<int64_t*>(rows.data());
    b.out = array(out);
    on_both("head_rows", false,
            [&] {
                const int64_t found = fusedloss_run(HEAD_ROWS, &a);
                require(found == fine || (found <= some && found > some - a.n),
                        "head_rows: a label out of range");
                b.count = found == fine ? a.n : some - found;
                double* of_rows = static_cast<double*>(rows.data());
                std::copy_n(of_rows + 3 * a.n, b.count, of_rows + 4 * a.n);  // losses
                require(fusedloss_run(HEAD_RESULTS, &b) == fine, "head_results: failed");
                return int64_t(-1);
            },
            {&out});
}

// The same on every machine: what was drawn is.
std::atomic<uint64_t> drawn{0};

}  // namespace
