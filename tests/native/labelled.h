// Random calls of the kernels whose targets are sequences, sets and masks of classes.
#pragma once
#include "driver.h"

namespace {

// Each element in [low, high), or one of them not where they are to be `wrong`, of any integer type.
Tensor integers(Random& r, const Sizes& sizes, Layout layout, int64_t low, int64_t high, bool wrong) {
    const auto type = low < 0 ? r.of<int64_t>({I64, I32, I16}) : r.of<int64_t>({I64, I32, I16, U16, U64});
    Tensor t = make(r, type, sizes, layout, gap);
    t.each([&](int64_t, int64_t offset) {
        const int64_t y = wrong && r.chance(5) ? high : low + r.below(high - low);
        std::memcpy(t.memory.get() + offset * size_of(type), &y, size_t(size_of(type)));  // little-endian
    });
    return t;
}

void ctc_call(Random& r) {
    CtcArgs a{};
    const int64_t most = budget(r);
    a.c = 1 + r.below(30);
    a.n = 1 + r.below(6);
    a.t = std::max<int64_t>(1, size(r, most / (a.c * a.n)));
    a.most = 1 + r.below(12);
    a.blank = r.below(a.c);
    a.zero_infinity = r.chance(50);
    const bool special = r.chance(20), reduced = r.chance(60), padded = r.chance(50), wrong = r.chance(10);
    a.mean = reduced && r.chance(50);
    a.denominator = r.chance(50) ? double(a.n) : 7.5;
    std::vector<int64_t> lengths(size_t(4 * a.n));
    int64_t *frames = lengths.data(), *counts = frames + a.n, *begins = counts + a.n, labels = 0;
    for (int64_t n = 0; n < a.n; ++n) {
        frames[n] = r.below(a.t + 1);
        counts[n] = r.below(a.most + 1);
        begins[n] = std::exchange(labels, labels + counts[n]);
    }
    const Sizes whole = {a.t, a.n, a.c};
    Tensor target = integers(r, padded ? Sizes{a.n, a.most} : Sizes{labels}, ANY, 0, a.c, wrong);
    a.label_stride = target.strides.back();
    for (int64_t n = 0; n < a.n; ++n)
        begins[n] = padded ? n * target.strides[0] : begins[n] * target.strides[0];
    Tensor input = floats(r, float_type(r), whole, EXPANDED, -4, 0, special), incoming;
    if (r.chance(40)) incoming = floats(r, float_type(r), {a.n}, EXPANDED, -1, 1, special);
    Tensor loss = output(r, reduced ? 0 : 100, {a.n}, DENSE);
    Tensor total = output(r, reduced ? 100 : 0, {}, DENSE);
    Tensor grad = output(r, 70, whole, ANY);
    a.lengths = lengths.data();
    a.target = {target.data(), target.dtype};
    a.input = grid(input);
    a.incoming = {incoming.data(), incoming.dtype};
    a.incoming_stride = incoming ? incoming.strides[0] : 0;
    a.loss = {loss.data(), loss.dtype};
    a.total = {total.data(), total.dtype};
    a.grad = grid(grad);
    const auto run = [&] { return fusedloss_run(CTC_LOSS, &a); };
    const int64_t bad = on_both("ctc_loss", true, run, {&loss, &total, &grad});
    require(bad < 0 || wrong, "ctc_loss: refused a label in range");
    if (bad < 0 && !special) grad.check_finite("ctc_loss");  // where there is no alignment, too
}

void margins_call(Random& r) {
    MarginArgs a{};
    std::tie(a.rows, a.classes) = rows_of_classes(r, 300);
    a.sets = r.chance(50);
    a.labels = a.sets ? a.classes : 1;
    a.squared = !a.sets && r.chance(50);
    a.margin = r.uniform(0.1, 3);
    const bool special = r.chance(20), reduced = r.chance(60), wrong = r.chance(10);
    a.denominator = reduced ? double(std::max<int64_t>(a.rows, 1)) : 1;
    a.grad_scale = 1 / a.denominator;
    const Sizes whole = {a.rows, a.classes}, column = {a.rows, 1};
    Tensor input = floats(r, float_type(r), whole, EXPANDED, -2, 2, special), weight, incoming;
    Tensor target = integers(r, {a.rows, a.labels}, EXPANDED, a.sets ? -1 : 0, a.classes, wrong);
    if (!a.sets && r.chance(40))
        weight = floats(r, input.dtype == F64 ? F64 : F32, {a.classes}, DENSE, 0.1, 2, special);
    if (r.chance(40)) incoming = floats(r, float_type(r), column, EXPANDED, -1, 1, special);
    Tensor loss = output(r, reduced ? 0 : 100, column, DENSE);
    Tensor total = output(r, reduced ? 100 : 0, {1, 1}, DENSE);
    Tensor grad = output(r, 70, whole, ANY);
    a.input = matrix(input);
    a.target = matrix(target);
    a.weight = {weight.data(), weight.dtype};
    a.incoming = matrix(incoming);
    a.loss = matrix(loss);
    a.total = matrix(total);
    a.grad = matrix(grad);
    const auto run = [&] { return fusedloss_run(MARGINS, &a); };
    const int64_t bad = on_both("margins", false, run, {&loss, &total, &grad});
    require(bad < 0 || wrong, "margins: refused a label in range");
    if (bad >= 0 || special) return;
    for (const Tensor* t : {&loss, &total, &grad})
        if (t->dtype != F16) t->check_finite("margins");
}

void dice_call(Random& r) {
    DiceArgs a{};
    const int64_t most = budget(r);
    a.c = 1 + r.below(r.chance(20) ? 300 : 12);
    a.d = size(r, most / a.c);
    a.n = size(r, most / (a.c * std::max<int64_t>(a.d, 1)));
    a.activation = r.below(3);
    a.masks = r.chance(40);
    a.batch = r.chance(50);
    a.first = a.c > 1 && r.chance(30);
    a.weighting = r.chance(50) ? 0 : 1 + r.below(3);
    a.skip_absent = r.chance(30);
    a.threads = 1 + r.below(4);
    a.ignore_index = r.chance(40) ? r.below(a.c) : -100;
    a.alpha = r.uniform(0, 1), a.beta = r.uniform(0, 1);
    a.smooth_nr = r.uniform(0, 0.1), a.smooth_dr = r.uniform(0.01, 0.1);
    const bool special = r.chance(20), wrong = !a.masks && r.chance(10);
    const bool rows_too = a.activation == 0 && !a.masks && r.chance(40), reduced = rows_too || r.chance(60);
    a.mean = reduced && r.chance(50);
    a.by_overlap = 1, a.by_rows = rows_too ? 0.7 : 0.0;
    a.gamma = rows_too && r.chance(50) ? r.of<double>({2, 1.5}) : 0.0;
    const Sizes whole = {a.n, a.c, a.d};
    const Layout in = r.chance(40) ? DENSE : EXPANDED;
    const double low = a.activation == 2 ? 0 : -4, high = a.activation == 2 ? 1 : 4;
    Tensor input = floats(r, float_type(r), whole, in, low, high, special), weight, incoming, target;
    if (a.masks && r.chance(60))
        target = floats(r, float_type(r), whole, in, 0, 1, special);
    else
        target = integers(r, a.masks ? whole : Sizes{a.n, a.d}, in, 0, a.masks ? 2 : a.c, wrong);
    if (r.chance(40)) weight = floats(r, input.dtype == F64 ? F64 : F32, {a.c}, DENSE, 0.1, 2, special);
    const int64_t groups = a.batch ? 1 : a.n, entries = a.weighting ? 1 : a.c - a.first;
    const Sizes losses = {groups, 1, entries};
    if (r.chance(40))
        incoming = floats(r, float_type(r), reduced ? Sizes{1, 1, 1} : losses, EXPANDED, -1, 1, special);
    Tensor loss = output(r, reduced ? 0 : 100, losses, ANY);
    Tensor total = output(r, reduced ? 100 : 0, {}, DENSE);
    Tensor grad = output(r, 70, whole, r.chance(60) ? DENSE : ANY);
    const auto of_losses = [](const Tensor& t, bool one) {
        return t ? Grid{t.data(), t.dtype, {one ? 0 : t.strides[0], one ? 0 : t.strides[2], 0}} : Grid{};
    };
    a.input = grid(input);
    a.target = a.masks ? grid(target) : row_grid(target);
    a.weight = {weight.data(), weight.dtype, {1, 0, 0}};
    a.incoming = of_losses(incoming, reduced);
    a.loss = of_losses(loss, false);
    a.total = {total.data(), total.dtype, {}};
    a.grad = grid(grad);
    const bool repeated = r.chance(30);
    const auto run = [&] {
        if (repeated)
            return again(DICE, a,
                         {offsetof(DiceArgs, input), offsetof(DiceArgs, target), offsetof(DiceArgs, total),
                          offsetof(DiceArgs, grad), offsetof(DiceArgs, incoming)});
        return fusedloss_run(DICE, &a);
    };
    const int64_t bad = on_both("dice", true, run, {&loss, &total, &grad});
    require(bad < 0 || wrong, "dice: refused a class index in range");
    // Of no image, and of rows of which none counts, the mean is NaN.
    if (bad >= 0 || special || a.ignore_index >= 0 || a.n * a.d == 0) return;
    for (const Tensor* t : {&loss, &total, &grad})
        if (t->dtype != F16) t->check_finite("dice");
}

}  // namespace
