// The inner loops of smooth MaxSim over a vector type V; included as cpu_kernels.h is, and under the same rules.

#pragma once

#include "cpu_kernels.h"

namespace jmlr::maxsim::cpu {
namespace {

template <class V>
constexpr int64_t block_row = int64_t{widest_panel} * V::lanes;

// 2**x within about an ulp, for x up to 127; 0 below -126.5, infinity above 127.5, NaN for NaN.
//
// x = n + f with |f| <= 1/2, both exact: adding 1.5 * 2**23 leaves no room for a fraction. The polynomial is the
// minimax of the relative error that is exact at 0, 1.6e-8 with these coefficients; n goes into the exponent's bits.
template <class V>
JMLR_INLINE typename V::Floats power_of_two(typename V::Floats x) {
    constexpr float coefficients[] = {0x1.3b2d4ep-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e430p-1f, 1.0f};
    // Second in both, so that NaN stays.
    x = V::minimum_or_second(V::broadcast_float(128.0f), V::maximum_or_second(V::broadcast_float(-127.0f), x));
    const auto shift = V::broadcast_float(12582912.0f + 127.0f);
    const auto shifted = V::add(x, shift), fraction = V::subtract(x, V::subtract(shifted, shift));
    auto power = V::multiply_add(V::broadcast_float(0x1.41fbaep-13f), fraction, V::broadcast_float(0x1.5f3e6ap-10f));
#pragma GCC unroll 8
    for (float coefficient : coefficients) {
        power = V::multiply_add(power, fraction, V::broadcast_float(coefficient));
    }
    return V::multiply(power, V::low_bits_as_exponent(shifted));
}

// ------------------------------------------------------------------ similarities

template <class V, class Product, int vectors>
void similarities_of_vectors(const PanelTask& task, float* block) {
    cover<V, vectors>(task.tokens, [&](auto rows, int64_t first) JMLR_FLATTEN {
        constexpr int tokens = decltype(rows)::count;
        typename V::Floats sum[tokens][vectors];
        multiply_tile<V, Product, vectors, tokens>(task, first, sum);
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
            if (first + t >= task.tokens) break;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) V::store(block + (first + t) * block_row<V> + v * V::lanes, sum[t][v]);
        }
    });
}

template <class V, class Product>
void similarities(const PanelTask& task, float* block) {
    task.vectors == 1 ? similarities_of_vectors<V, Product, 1>(task, block)
                      : similarities_of_vectors<V, Product, 2>(task, block);
}

// ------------------------------------------------------------------ exponentials

template <class V>
void add_exponentials(const float* block, int64_t tokens, int vectors, float exponent_scale, float* best_of_rows,
                      float* total_of_rows) {
    constexpr int chains = 4;  // hides the latency of what feeds them
    using Floats = typename V::Floats;
    const Floats scale = V::broadcast_float(exponent_scale);
    for (int v = 0; v < vectors; ++v) {
        const float* column = block + v * V::lanes;
        const Floats before = V::load(best_of_rows + v * V::lanes);
        Floats best[chains];
        for (int c = 0; c < chains; ++c) best[c] = before;
        int64_t t = 0;
        for (; t + chains <= tokens; t += chains) {
            for (int c = 0; c < chains; ++c) {
                best[c] = V::maximum_or_second(V::load(column + (t + c) * block_row<V>), best[c]);
            }
        }
        for (; t < tokens; ++t) best[0] = V::maximum_or_second(V::load(column + t * block_row<V>), best[0]);
        const Floats after =
            V::maximum_or_second(V::maximum_or_second(best[0], best[1]), V::maximum_or_second(best[2], best[3]));
        // The difference of two infinities is NaN: of an infinite maximum nothing is subtracted.
        const Floats difference = V::subtract(after, after);
        const Floats centre = V::select(V::unordered(difference, difference), V::zero(), after);
        Floats sum[chains];
        for (int c = 0; c < chains; ++c) sum[c] = V::zero();
        const auto power = [&](int64_t at) JMLR_FLATTEN {
            const Floats below = V::subtract(V::load(column + at * block_row<V>), centre);
            return power_of_two<V>(V::multiply(below, scale));
        };
        for (t = 0; t + chains <= tokens; t += chains) {
#pragma GCC unroll 4
            for (int c = 0; c < chains; ++c) sum[c] = V::add(sum[c], power(t + c));
        }
        for (; t < tokens; ++t) sum[0] = V::add(sum[0], power(t));
        const Floats fresh = V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]));
        const auto grown = V::greater_or_first_nan(after, before);  // maxima are never NaN
        const Floats decay = power_of_two<V>(V::multiply(V::subtract(before, after), scale));
        const Floats total = V::load(total_of_rows + v * V::lanes);
        const Floats kept = V::select(grown, V::multiply(total, decay), total);
        V::store(best_of_rows + v * V::lanes, after);
        V::store(total_of_rows + v * V::lanes, V::add(kept, fresh));
    }
}

template <class V>
void shares(const SharesTask& task) {
    using Floats = typename V::Floats;
    const Floats scale = V::broadcast_float(task.exponent_scale);
    const Floats nothing = V::broadcast_float(-__builtin_inff());
    for (int v = 0; v < task.vectors; ++v) {
        const Floats maximum = V::load(task.maxima + v * V::lanes), factor = V::load(task.factors + v * V::lanes);
        // Selected, not multiplied by zero: what does not count may be infinite or NaN.
        const auto counts = V::greater_or_first_nan(maximum, nothing);
        const auto share = [&](int64_t t) JMLR_FLATTEN {
            float* place = task.block + t * block_row<V> + v * V::lanes;
            const Floats below = V::subtract(V::load(place), maximum);
            const Floats power = power_of_two<V>(V::multiply(below, scale));
            V::store(place, V::select(counts, V::multiply(power, factor), V::zero()));
        };
        int64_t t = 0;
        for (; t + 4 <= task.tokens; t += 4) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) share(t + u);
        }
        for (; t < task.tokens; ++t) share(t);
    }
}

// ------------------------------------------------------------------ products

// One tile of sums in registers. Past the last row the last one is repeated: both store the same.
template <class V, int vectors, int rows, bool transposed>
JMLR_INLINE void product_tile(const ProductTask& task, int64_t first, const float* right, float* sums) {
    using Floats = typename V::Floats;
    constexpr int64_t row_step = transposed ? 1 : block_row<V>, depth_step = transposed ? block_row<V> : 1;
    const float* left[rows];
    float* target[rows];
    Floats sum[rows][vectors];
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
        const int64_t row = first + m < task.rows ? first + m : task.rows - 1;
        left[m] = task.left + row * row_step;
        target[m] = sums + row * task.columns;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[m][v] = V::zero();
    }
#pragma GCC unroll 2
    for (int64_t k = 0; k < task.depth; ++k) {
        Floats columns[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) columns[v] = V::load(right + k * block_row<V> + v * V::lanes);
#pragma GCC unroll 16
        for (int m = 0; m < rows; ++m) {
            const Floats factor = V::broadcast(reinterpret_cast<const char*>(left[m] + k * depth_step));
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[m][v] = V::multiply_add(columns[v], factor, sum[m][v]);
        }
    }
    // All are loaded before any is stored, for the repeated row's sake.
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[m][v] = V::add(sum[m][v], V::load(target[m] + v * V::lanes));
    }
#pragma GCC unroll 16
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) V::store(target[m] + v * V::lanes, sum[m][v]);
    }
}

template <class V, int vectors, bool transposed>
void add_product_of_slice(const ProductTask& task, const float* right, float* sums) {
    cover<V, vectors>(task.rows, [&](auto rows, int64_t first) JMLR_FLATTEN {
        product_tile<V, vectors, decltype(rows)::count, transposed>(task, first, right, sums);
    });
}

template <class V, bool transposed>
void add_product_of_block(const ProductTask& task) {
    const float* right = task.right;
    for (int64_t column = 0; column < task.columns; column += block_row<V>, right += task.slice) {
        if (task.columns - column > V::lanes) {
            add_product_of_slice<V, widest_panel, transposed>(task, right, task.sums + column);
        } else {
            add_product_of_slice<V, 1, transposed>(task, right, task.sums + column);
        }
    }
}

template <class V>
void add_product(const ProductTask& task) {
    static_assert(widest_panel == 2);
    task.transposed ? add_product_of_block<V, true>(task) : add_product_of_block<V, false>(task);
}

template <class V>
constexpr SmoothInstructions smooth_instructions(void (*similarities_of_pairs)(const PanelTask&, float*) = nullptr) {
    return {similarities<V, FloatProduct<V>>, similarities_of_pairs, add_exponentials<V>, shares<V>, add_product<V>};
}

}  // namespace
}  // namespace jmlr::maxsim::cpu
