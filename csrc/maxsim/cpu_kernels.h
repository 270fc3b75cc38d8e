// The inner loops of the CPU path over a vector type V; included by one source file per instruction set.
//
// Everything is in an anonymous namespace and uses no other header's inline functions: a function that the linker
// shared between files would run with the instructions of whichever file it came from.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_instructions.h"

#define JMLR_FLATTEN __attribute__((always_inline))
#define JMLR_INLINE inline JMLR_FLATTEN

namespace jmlr::maxsim::cpu {
namespace {

constexpr int64_t cache_line = 64;

// What one unit of a query row and one of a document row add to their similarity.
template <class V>
struct FloatProduct {
    static JMLR_INLINE typename V::Floats add(typename V::Floats sum, typename V::Floats query,
                                              typename V::Floats document) {
        return V::multiply_add(query, document, sum);
    }
};

// The similarities of one tile: `tokens` document rows against `vectors` vectors of query rows, every sum in a
// register, one chain of fused additions each, so that a similarity does not depend on where in a tile it is computed.
//
// Past the last token the last one is repeated, so that no remainder needs code of its own.
template <class V, class Product, int vectors, int tokens>
JMLR_INLINE void multiply_tile(const PanelTask& task, int64_t first, typename V::Floats (&sum)[tokens][vectors]) {
    using Floats = typename V::Floats;
    const char* row[tokens];
    float scale[tokens];
    for (int t = 0; t < tokens; ++t) {
        const int64_t k = first + t < task.tokens ? first + t : task.tokens - 1;
        row[t] = task.rows ? task.rows[k] : task.first_row + k * task.row_bytes;
        scale[t] = task.scales ? task.scales[k] : 1.0f;
    }
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[t][v] = V::zero();
    }
    constexpr int64_t panel_step = int64_t{vectors} * V::lanes * 4;
    const char* query = static_cast<const char*>(task.panel);
    const auto step = [&](int64_t s, auto read) JMLR_FLATTEN {
        Floats rows_of_queries[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            rows_of_queries[v] = V::load(reinterpret_cast<const float*>(query + v * V::lanes * 4));
        }
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
            const Floats document = read(row[t] + s * 4);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[t][v] = Product::add(sum[t][v], rows_of_queries[v], document);
        }
        query += panel_step;
    };
    const auto whole = [](const char* at) JMLR_FLATTEN { return V::broadcast(at); };
    const int64_t whole_steps = task.steps - (task.half_step ? 1 : 0);
    // Into the first cache one tile ahead, and where rows come from memory, into the second one much farther ahead. A
    // prefetch may name any address.
    const auto next_tile = static_cast<uintptr_t>(task.row_bytes) * tokens;
    const auto ahead = static_cast<uintptr_t>(task.prefetch_bytes);
    constexpr int64_t steps_of_line = cache_line / 4;
    int64_t s = 0;
    for (; s + steps_of_line <= whole_steps; s += steps_of_line) {
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
            const auto line = reinterpret_cast<uintptr_t>(row[t] + s * 4);
            __builtin_prefetch(reinterpret_cast<const void*>(line + next_tile), 0, 3);
            if (ahead) __builtin_prefetch(reinterpret_cast<const void*>(line + ahead), 0, 2);
        }
#pragma GCC unroll 2
        for (int64_t u = 0; u < steps_of_line; ++u) step(s + u, whole);
    }
    for (; s < whole_steps; ++s) step(s, whole);
    if (task.half_step) step(s, [](const char* at) JMLR_FLATTEN { return V::broadcast_half_unit(at); });
    if (task.scales) {
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[t][v] = V::multiply(sum[t][v], V::broadcast_float(scale[t]));
        }
    }
}

// The maxima of one tile; a repeated token cannot win against itself.
template <class V, class Product, int vectors, int tokens, bool with_winners>
JMLR_INLINE void tile(const PanelTask& task, int64_t first) {
    using Floats = typename V::Floats;
    Floats sum[tokens][vectors];
    multiply_tile<V, Product, vectors, tokens>(task, first, sum);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
        const Floats before = V::load(task.best + v * V::lanes);
        // A maximum instruction drops NaN: it is looked for apart, two tokens at a time.
        Floats best = before;
        auto nan = V::unordered(sum[0][v], sum[tokens - 1][v]);
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) {
            best = V::maximum_or_second(sum[t][v], best);
            if (t % 2 == 1 && t + 1 < tokens) nan = V::either(nan, V::unordered(sum[t][v], sum[t + 1][v]));
        }
        if constexpr (!with_winners) {
            V::store(task.best + v * V::lanes, V::nan_where(nan, best));
            continue;
        }
        auto winner = V::load_integers(task.winners + v * V::lanes);
        const auto position = static_cast<int32_t>(task.first_position + first);
        if (!V::any(nan)) {
            const auto improved = V::greater_or_first_nan(best, before);
#pragma GCC unroll 16
            for (int t = tokens - 1; t >= 0; --t) {  // the lowest of equals comes last
                const auto wins = V::equal_where(improved, sum[t][v], best);
                winner = V::select(wins, V::broadcast_integer(position + t), winner);
            }
        } else {
            best = before;
            for (int t = 0; t < tokens; ++t) {
                const auto wins = V::greater_or_first_nan(sum[t][v], best);
                best = V::select(wins, sum[t][v], best);
                winner = V::select(wins, V::broadcast_integer(position + t), winner);
            }
        }
        V::store(task.best + v * V::lanes, best);
        V::store_integers(task.winners + v * V::lanes, winner);
    }
}

template <int rows>
struct Rows {
    static constexpr int count = rows;
};

// `tile(Rows, first)` for tiles of three sizes over `count` rows; the last one may reach behind them.
template <class V, int vectors, class Tile>
JMLR_INLINE void cover(int64_t count, const Tile& tile) {
    constexpr int large = V::tile_tokens(vectors), middle = large * 2 / 3, small = large / 3;
    static_assert(large % 2 == 0 && small >= 1);
    int64_t first = 0;
    for (; count - first > middle; first += large) tile(Rows<large>{}, first);
    if (count - first > small) {
        tile(Rows<middle>{}, first);
    } else if (count > first) {
        tile(Rows<small>{}, first);
    }
}

template <class V, class Product, int vectors, bool with_winners>
void all_tiles(const PanelTask& task) {
    cover<V, vectors>(task.tokens, [&](auto rows, int64_t first) JMLR_FLATTEN {
        tile<V, Product, vectors, decltype(rows)::count, with_winners>(task, first);
    });
}

template <class V, class Product>
void maxima(const PanelTask& task) {
    if (task.vectors == 1) {
        task.winners ? all_tiles<V, Product, 1, true>(task) : all_tiles<V, Product, 1, false>(task);
    } else {
        task.winners ? all_tiles<V, Product, 2, true>(task) : all_tiles<V, Product, 2, false>(task);
    }
}

JMLR_INLINE float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

JMLR_INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

JMLR_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponent moves to float's place; multiplying by 2**112 corrects its bias and normalises small numbers.
    return bits_to_float(float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000)) | sign);
}

JMLR_INLINE uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
    if (rest < 0x38800000) {  // below 2**-14: adding 0.5 leaves units of 2**-24 in the last bits, correctly rounded
        return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
}

JMLR_INLINE uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Elements of one type as floats, a vector or one at a time. Rows need not be aligned.
template <class V>
struct Float32Elements {
    static constexpr int64_t size = 4;
    static JMLR_INLINE typename V::Floats load(const char* at) {
        return V::load_unaligned(reinterpret_cast<const float*>(at));
    }
    static JMLR_INLINE float one(const char* at) {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
};

template <class V>
struct Float16Elements {
    static constexpr int64_t size = 2;
    static JMLR_INLINE typename V::Floats load(const char* at) { return V::load_halves(at); }
    static JMLR_INLINE float one(const char* at) {
        uint16_t value;
        std::memcpy(&value, at, 2);
        return half_to_float(value);
    }
};

template <class V>
struct Bfloat16Elements {
    static constexpr int64_t size = 2;
    static JMLR_INLINE typename V::Floats load(const char* at) { return V::load_bfloat16(at); }
    static JMLR_INLINE float one(const char* at) {
        uint16_t value;
        std::memcpy(&value, at, 2);
        return bits_to_float(uint32_t{value} << 16);
    }
};

template <class V, class Elements, int vectors>
JMLR_INLINE void sum_columns(const char* const* rows, const float* coefficients, int64_t count, int64_t first,
                             float* sum) {
    typename V::Floats total[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) total[v] = V::load_unaligned(sum + first + v * V::lanes);
    for (int64_t k = 0; k < count; ++k) {
        const auto coefficient = V::broadcast_float(coefficients[k]);
        const char* row = rows[k] + first * Elements::size;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            total[v] = V::multiply_add(Elements::load(row + v * V::lanes * Elements::size), coefficient, total[v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) V::store_unaligned(sum + first + v * V::lanes, total[v]);
}

template <class V, class Elements>
void sum_rows(const char* const* rows, const float* coefficients, int64_t count, int64_t dimension, float* sum) {
    int64_t d = 0;
    for (; d + 8 * V::lanes <= dimension; d += 8 * V::lanes) {
        sum_columns<V, Elements, 8>(rows, coefficients, count, d, sum);
    }
    for (; d + V::lanes <= dimension; d += V::lanes) sum_columns<V, Elements, 1>(rows, coefficients, count, d, sum);
    for (; d < dimension; ++d) {
        float total = sum[d];
        for (int64_t k = 0; k < count; ++k) total += coefficients[k] * Elements::one(rows[k] + d * Elements::size);
        sum[d] = total;
    }
}

template <class V>
void weighted_sum(Type type, const void* const* rows, const float* coefficients, int64_t count, int64_t dimension,
                  float* sum) {
    const auto bytes = reinterpret_cast<const char* const*>(rows);
    if (type == Type::float32) {
        sum_rows<V, Float32Elements<V>>(bytes, coefficients, count, dimension, sum);
    } else if (type == Type::float16) {
        sum_rows<V, Float16Elements<V>>(bytes, coefficients, count, dimension, sum);
    } else {
        sum_rows<V, Bfloat16Elements<V>>(bytes, coefficients, count, dimension, sum);
    }
}

template <class V>
float dot(const float* a, const float* b, int64_t dimension) {
    typename V::Floats sums[2] = {V::zero(), V::zero()};
    int64_t d = 0;
    for (; d + 2 * V::lanes <= dimension; d += 2 * V::lanes) {
        for (int v = 0; v < 2; ++v) {
            const int64_t at = d + v * V::lanes;
            sums[v] = V::multiply_add(V::load_unaligned(a + at), V::load_unaligned(b + at), sums[v]);
        }
    }
    float rest = 0;
    for (; d < dimension; ++d) rest += a[d] * b[d];
    return V::sum(V::add(sums[0], sums[1])) + rest;
}

template <class V, class Elements>
JMLR_INLINE void widen_elements(const char* from, int64_t dimension, float* to) {
    int64_t d = 0;
    for (; d + V::lanes <= dimension; d += V::lanes)
        V::store_unaligned(to + d, Elements::load(from + d * Elements::size));
    for (; d < dimension; ++d) to[d] = Elements::one(from + d * Elements::size);
}

template <class V>
void widen(Type type, const void* from, int64_t dimension, float* to) {
    const auto bytes = static_cast<const char*>(from);
    if (type == Type::float32) {
        widen_elements<V, Float32Elements<V>>(bytes, dimension, to);
    } else if (type == Type::float16) {
        widen_elements<V, Float16Elements<V>>(bytes, dimension, to);
    } else {
        widen_elements<V, Bfloat16Elements<V>>(bytes, dimension, to);
    }
}

template <class V>
void narrow(Type type, const float* from, int64_t dimension, void* to) {
    const auto bytes = static_cast<char*>(to);
    if (type == Type::float32) {
        std::memcpy(to, from, static_cast<size_t>(dimension) * 4);
        return;
    }
    int64_t d = 0;
    if (type == Type::float16) {
        for (; d + V::lanes <= dimension; d += V::lanes) V::store_halves(bytes + d * 2, V::load_unaligned(from + d));
    } else {
        for (; d + V::lanes <= dimension; d += V::lanes) V::store_bfloat16(bytes + d * 2, V::load_unaligned(from + d));
    }
    for (; d < dimension; ++d) {
        const uint16_t value = type == Type::float16 ? float_to_half(from[d]) : float_to_bfloat16(from[d]);
        std::memcpy(bytes + d * 2, &value, 2);
    }
}

}  // namespace
}  // namespace jmlr::maxsim::cpu
