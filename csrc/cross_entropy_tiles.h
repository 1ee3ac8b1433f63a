// Cross entropy, vectorised across the rows.
#pragma once
#include "positions.h"
#include "transpose.h"

namespace fusedloss {

// Strided classes: vectorised across positions, on a copy of the tile, since strides that are powers of two
// would have its classes evict each other from the caches. The passes are those of RowKernel.
template <class T>
class TileKernel {
public:
    TileKernel(const Rows<T>& rows, int64_t lanes)
        : r(rows),
          a(rows.a),
          width(lanes),
          soft(a.probabilities || r.soft != T(0)),
          focal_parts(a.gamma != 0 && soft),
          tile(size_t(a.c * lanes)) {
        if (soft) parts.resize(tile.size());
    }

    // Positions at a time: as many as keep a tile in the first-level cache; in the second, where the classes
    // lie apart, since memory gives short stretches slowly.
    static int64_t lanes(int64_t classes, int64_t across, bool apart) {
        const int64_t fit = (apart ? 262144 : 32768) / int64_t(sizeof(T)) / std::max<int64_t>(classes, 1);
        return std::clamp<int64_t>(std::min(fit / 16, (across + 15) / 16) * 16, 16, most);
    }

    void operator()(int64_t n, int64_t d0, int64_t count, double* losses) {
        // Whole vectors, for the same reason as in pointwise.h; the tile's tail is filled with zeros.
        const int64_t padded = (count + 15) / 16 * 16;
        gather(n, d0, count, padded);
        const double hard = double(r.hard);
        if (focal_parts)
            gather_focal(padded, losses);
        else if (a.probabilities)
            position_losses<T, false, true>(p, padded, hard, losses);
        else if (soft)
            position_losses<T, true, true>(p, padded, hard, losses);
        else
            position_losses<T, true, false>(p, padded, hard, losses);
        if (a.gamma != 0 && !soft) focus(p, padded, a.gamma, losses);
        if (!a.grad.data && !a.grad_target.data) return;

        incoming(n, d0, count, padded);
        const bool small = a.probabilities || focal_parts
                               ? position_slopes<T, false, true>(p, padded, hard, 0)
                           : soft ? position_slopes<T, true, true>(p, padded, hard, double(r.soft))
                                  : position_slopes<T, true, false>(p, padded, hard, 0);
        for (int64_t c = 0; c < a.c && small; ++c) multiply_each(at(c), p.lowering, padded, at(c), at(c));
        if (a.grad.data) write(n, d0, count, padded);
        if (a.grad_target.data) target_gradient(n, d0, count);
    }

protected:
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T, for whole vectors
    static constexpr T infinity = std::numeric_limits<T>::infinity();
    static constexpr int64_t most = Positions<T>::most;
    static constexpr int64_t strip = 64;  // rows that are transposed at a time
    const Rows<T>& r;
    const RowsArgs& a;
    const int64_t width;
    const bool soft, focal_parts;
    bool any_ignored = false;
    std::vector<T> tile, parts, converted;
    Positions<T> p;
    alignas(64) Index largest[most];

    T* at(int64_t c) { return tile.data() + c * width; }
    T* part(int64_t c) { return parts.data() + c * width; }

    // The exps, of all but the own classes, and their sums.
    void gather(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        read(n, d0, count, padded);
        settle(n, d0, count, padded);
        if (focal_parts)
            keep_gaps(padded);
        else if (soft)
            gather_soft(n, d0, count, padded);
        // The own class leaves the sums.
        set_own(p.y, count, [](int64_t) { return -infinity; }, tile.data(), width);
        for (int64_t c = 0; c < a.c; ++c) exp_in_place(at(c), p.max, padded);
        own_exps(p, padded);
        const int64_t fours = a.c / 4 * 4;
        for (int64_t c = 0; c < fours; c += 4) add_four(p.others, at(c), width, padded);
        for (int64_t c = fours; c < a.c; ++c) add(p.others, at(c), padded);
    }

    void read(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        std::fill_n(p.max, padded, -infinity);
        std::fill_n(p.others, padded, 0.0);
        std::fill_n(largest, padded, Index(0));
        const bool direct = dense(a.input) && !a.probabilities && !focal_parts;
        if (!direct) load_tile(a.input, n, d0, count, tile.data());
        for (int64_t c = 0; c < a.c; ++c) {
            std::fill(at(c) + count, at(c) + padded, T(0));
            if (direct)
                copy_and_raise(stretch(a.input, n, d0, c), count, at(c), p.max,
                               after(a.input, n, d0, c, count));
            else if (a.probabilities || focal_parts)
                raise(p.max, largest, at(c), Index(c), padded);
            else
                raise(p.max, at(c), padded);
        }
        for (int64_t i = 0; i < padded; ++i) p.max[i] = p.max[i] == -infinity ? T(0) : p.max[i];
    }

    // Each position's own class, its logit and its weight.
    void settle(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        if (a.probabilities)
            std::copy_n(largest, count, p.y);
        else
            r.labels(n, d0, count, p.y);
        any_ignored = !a.probabilities && mark_ignored(p.y, count, a.ignore_index, p.ignored);
        std::fill(p.y + count, p.y + padded, p.ignored);
        own_logits(p, tile.data(), width, padded);
        for (int64_t i = 0; i < padded && !r.weight; ++i) p.weight[i] = p.y[i] >= 0 ? 1.0 : 0.0;
        for (int64_t i = 0; i < padded && r.weight; ++i)
            p.weight[i] = p.y[i] >= 0 ? double(r.weight[p.y[i]]) : 0.0;
    }

    void incoming(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        const double by = a.mean ? r.denominator : 1.0;
        std::fill_n(p.incoming, count, 1.0 / by);
        std::fill(p.incoming + count, p.incoming + padded, 0.0);
        if (!a.incoming.data) return;
        load_strided<double>(memory(a.incoming, row_start(a.incoming, n, d0)), a.incoming.dtype,
                             a.incoming.stride[2], count, p.incoming);
        for (int64_t i = 0; i < count && a.mean; ++i) p.incoming[i] /= by;
    }

    // The exps become the gradient.
    void write(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        const bool direct = dense(a.grad) && padded == count;  // whole vectors, again
        const auto to = [&](int64_t c) { return direct ? stretch(a.grad, n, d0, c) : at(c); };
        for (int64_t c = 0; c < a.c; ++c) {
            const T* next = direct ? after(a.grad, n, d0, c, count) : at(c);
            if (soft)
                slope(at(c), p.factor, p.g, part(c), padded, to(c), next);
            else
                multiply_each(at(c), p.factor, padded, to(c), next);
        }
        settle_gradient(n, d0, count, direct);
    }

    // The own classes' entries and those of rows that do not count, where the others are.
    void settle_gradient(int64_t n, int64_t d0, int64_t count, bool direct) {
        const auto to = [&](int64_t c) { return direct ? stretch(a.grad, n, d0, c) : at(c); };
        const T* own = p.own;
        set_own(p.y, count, [own](int64_t i) { return own[i]; }, to(0), direct ? a.grad.stride[1] : width);
        for (int64_t i = 0; i < count && any_ignored; ++i)
            for (int64_t c = 0; p.y[i] == p.ignored && c < a.c; ++c) to(c)[i] = T(0);
        if (!direct) store_tile(a.grad, n, d0, count);
    }

    // Whether each class's positions lie one behind the other, in T.
    bool dense(const Grid& grid) const { return grid.dtype == dtype_of<T> && grid.stride[2] == 1; }

    static T* stretch(const Grid& grid, int64_t n, int64_t d0, int64_t c) {
        return static_cast<T*>(grid.data) + row_start(grid, n, d0) + c * grid.stride[1];
    }

    // What is read or written after class c: the next class, or the next tile.
    const T* after(const Grid& grid, int64_t n, int64_t d0, int64_t c, int64_t count) const {
        return c + 1 < a.c ? stretch(grid, n, d0, c + 1) : stretch(grid, n, d0 + count, 0);
    }

    bool holds_rows(const Grid& grid) const { return grid.stride[1] == 1 && grid.stride[2] == a.c; }

    void load_tile(const Grid& grid, int64_t n, int64_t d0, int64_t count, T* to) {
        const int64_t first = row_start(grid, n, d0);
        if (holds_rows(grid)) {
            for (int64_t i = 0; i < count; i += strip) {
                const int64_t rows = std::min(strip, count - i);
                const T* from = load(memory(grid, first + i * a.c), grid.dtype, 1, rows * a.c, by_rows(grid));
                transpose(from, a.c, rows, a.c, to + i, width);
            }
            return;
        }
        for (int64_t c = 0; c < a.c; ++c)
            load_strided<T>(memory(grid, first + c * grid.stride[1]), grid.dtype, grid.stride[2], count,
                            to + c * width);
    }

    void store_tile(const Grid& grid, int64_t n, int64_t d0, int64_t count) {
        const int64_t first = row_start(grid, n, d0);
        if (holds_rows(grid)) {
            const bool direct = grid.dtype == dtype_of<T>;
            for (int64_t i = 0; i < count; i += strip) {
                const int64_t rows = std::min(strip, count - i);
                void* at = memory(grid, first + i * a.c);
                T* to = direct ? static_cast<T*>(at) : by_rows(grid);
                transpose(tile.data() + i, width, a.c, rows, to, a.c);
                if (!direct) store(at, grid.dtype, 1, rows * a.c, to);
            }
            return;
        }
        for (int64_t c = 0; c < a.c; ++c)
            store(memory(grid, first + c * grid.stride[1]), grid.dtype, grid.stride[2], count, at(c));
    }

    // Memory for a strip of the tile's rows, one behind the other, where they must be converted.
    T* by_rows(const Grid& grid) {
        if (grid.dtype != dtype_of<T>) converted.resize(size_t(strip * a.c));
        return converted.data();
    }

    void gather_soft(int64_t n, int64_t d0, int64_t count, int64_t padded) {
        std::fill_n(p.dots, padded, 0.0);
        std::fill_n(p.masses, padded, 0.0);
        std::fill_n(p.rest, padded, 0.0);
        if (a.probabilities) load_tile(a.target, n, d0, count, parts.data());
        for (int64_t c = 0; c < a.c; ++c) {
            const T w = r.weight ? r.weight[c] : T(1);
            if (a.probabilities) {
                std::fill(part(c) + count, part(c) + padded, T(0));
                weigh<T>(part(c), r.hard * w, r.soft * w, nullptr, padded);
                add_but_largest(p.rest, part(c), largest, Index(c), padded);
            } else {
                std::fill_n(part(c), padded, r.soft * w);
                add(p.masses, part(c), padded);
            }
            add_products(p.dots, part(c), at(c), p.max, padded);
        }
        for (int64_t i = 0; i < count && a.probabilities; ++i)
            p.masses[i] = p.rest[i] + double(part(p.y[i])[i]);
    }

    // x - max, which the exps take the place of.
    void keep_gaps(int64_t padded) {
        for (int64_t c = 0; c < a.c; ++c)
            for (int64_t i = 0; i < padded; ++i) part(c)[i] = at(c)[i] - p.max[i];
    }

    // The losses, and what the gradient takes of each class.
    void gather_focal(int64_t padded, double* losses) {
        std::fill_n(p.rest, padded, 0.0);
        std::fill_n(p.masses, padded, 0.0);
        std::fill_n(losses, padded, 0.0);
        for (int64_t c = 0; c < a.c; ++c) add_but_largest(p.rest, at(c), largest, Index(c), padded);
        rest_of_largest(p, largest, padded);
        for (int64_t c = 0; c < a.c; ++c) {
            const T w = r.weight ? r.weight[c] : T(1);
            focus_part(p, at(c), largest, Index(c), double(r.hard * w), double(r.soft * w), a.gamma, padded,
                       part(c), losses);
        }
        // The largest class is the own one of the gradient: so is that of probabilities.
        for (int64_t i = 0; i < padded; ++i) {
            if (p.y[i] < 0) continue;
            at(p.y[i])[i] = p.own[i];
            p.y[i] = largest[i];
            p.own[i] = math::raised<T>;
            p.others[i] = p.dots[i];
        }
    }

    void target_gradient(int64_t n, int64_t d0, int64_t count) {
        alignas(64) T x[most];
        for (int64_t c = 0; c < a.c; ++c) {
            load_strided<T>(memory(a.input, row_start(a.input, n, d0) + c * a.input.stride[1]), a.input.dtype,
                            a.input.stride[2], count, x);
            const T scale = r.hard * (r.weight ? r.weight[c] : T(1));
            for (int64_t i = 0; i < count; ++i) {
                const bool absent = part(c)[i] == T(0) && x[i] == -std::numeric_limits<T>::infinity();
                x[i] = absent ? T(0) : p.g[i] * scale * ((p.max[i] - x[i]) + T(p.log_sum[i]));
            }
            store(memory(a.grad_target, row_start(a.grad_target, n, d0) + c * a.grad_target.stride[1]),
                  a.grad_target.dtype, a.grad_target.stride[2], count, x);
        }
    }
};

}  // namespace fusedloss
