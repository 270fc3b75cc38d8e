// Compressed tokens to float32 over a vector type V; included by one source file per instruction set, after
// cpu_kernels.h and under its rules.

#pragma once

#include "cpu_kernels.h"

namespace jmlr::maxsim::cpu {
namespace {

// e4m3 as float16: sign, exponent and mantissa at their places there, whose exponent bias is larger by 8. Subnormal
// codes come out right too. The code of all ones is NaN, which the factor cannot make.
constexpr float float8_factor = 256.0f;
constexpr int float8_nan = 0x7f;
constexpr uint16_t float8_places = 0xbf80;  // of float16's bits, of the code's sign extended and moved by 7

template <class V>
struct Int8Elements {
    static constexpr int64_t size = 1;
    static JMLR_INLINE typename V::Floats load(const char* at) { return V::load_int8(at); }
    static JMLR_INLINE float one(const char* at) { return static_cast<float>(static_cast<int8_t>(*at)); }
};

template <class V>
struct Float8Elements {
    static constexpr int64_t size = 1;
    static JMLR_INLINE typename V::Floats load(const char* at) { return V::load_float8(at); }
    static JMLR_INLINE float one(const char* at) {
        const int code = static_cast<int8_t>(*at);
        if ((code & float8_nan) == float8_nan) return bits_to_float(0x7fc00000);
        return half_to_float(static_cast<uint16_t>(static_cast<unsigned>(code) << 7 & float8_places)) * float8_factor;
    }
};

// Forms of a decoded row: how a vector of it is stored, and one element where a vector is too long.
template <class V>
struct Bfloat16Row {
    static JMLR_INLINE void store(void* row, int64_t d, typename V::Floats value) {
        V::store_bfloat16(static_cast<char*>(row) + d * 2, value);
    }
    static JMLR_INLINE void store_one(void* row, int64_t d, float value) {
        static_cast<uint16_t*>(row)[d] = float_to_bfloat16(value);
    }
};

template <class V>
struct RoundedToFloat16Row {
    static JMLR_INLINE void store(void* row, int64_t d, typename V::Floats value) {
        char rounded[V::lanes * 2];
        V::store_halves(rounded, value);
        V::store_unaligned(static_cast<float*>(row) + d, V::load_halves(rounded));
    }
    static JMLR_INLINE void store_one(void* row, int64_t d, float value) {
        static_cast<float*>(row)[d] = half_to_float(float_to_half(value));
    }
};

template <class V>
struct RoundedToBfloat16Row {
    static JMLR_INLINE void store(void* row, int64_t d, typename V::Floats value) {
        char rounded[V::lanes * 2];
        V::store_bfloat16(rounded, value);
        V::store_unaligned(static_cast<float*>(row) + d, V::load_bfloat16(rounded));
    }
    static JMLR_INLINE void store_one(void* row, int64_t d, float value) {
        static_cast<float*>(row)[d] = bits_to_float(uint32_t{float_to_bfloat16(value)} << 16);
    }
};

// from * factor
template <class V, class Elements, class Target>
JMLR_INLINE void rewrite(const char* from, float factor, int64_t dimension, void* to) {
    int64_t d = 0;
    for (; d + V::lanes <= dimension; d += V::lanes) {
        Target::store(to, d, V::multiply(Elements::load(from + d * Elements::size), V::broadcast_float(factor)));
    }
    for (; d < dimension; ++d) Target::store_one(to, d, Elements::one(from + d * Elements::size) * factor);
}

template <class V, class Elements>
JMLR_INLINE void decode_elements(const char* from, int64_t dimension, Row row, void* to) {
    if (row == Row::bfloat16) {
        rewrite<V, Elements, Bfloat16Row<V>>(from, 1.0f, dimension, to);
    } else {
        widen_elements<V, Elements>(from, dimension, static_cast<float*>(to));
    }
}

template <class V>
void decode_values(ValueType type, const void* from, int64_t dimension, Row row, void* to) {
    const auto bytes = static_cast<const char*>(from);
    if (type == ValueType::int8) {
        decode_elements<V, Int8Elements<V>>(bytes, dimension, row, to);
    } else {
        decode_elements<V, Float8Elements<V>>(bytes, dimension, row, to);
    }
}

// How far the field of element i is from the lowest bit of a little-endian number that starts with element 0's byte.
template <int bits>
constexpr int field_shift(int i) {
    return i * bits / 8 * 8 + 8 - bits - i * bits % 8;
}

template <int bits>
JMLR_INLINE float field_weight(const char* fields, const float* weights, int64_t d) {
    const int64_t bit = d * bits;
    return weights[static_cast<uint8_t>(fields[bit / 8]) >> (8 - bits - bit % 8)];
}

// Centroid plus weights as float32; returns the sum of their squares.
template <class V, class Elements, int bits>
float add_fields(const ResidualFormat& format, const char* centroid, const char* fields, float* row) {
    const int64_t dimension = format.dimension;
    const float* weights = format.weights;
    typename V::Floats squares[2] = {V::zero(), V::zero()};
    int64_t d = 0;
    const auto step = [&](int part) JMLR_FLATTEN {
        const auto weight = V::template field_weights<bits>(fields, weights, d);
        const auto value = V::add(Elements::load(centroid + d * Elements::size), weight);
        V::store_unaligned(row + d, value);
        squares[part] = V::multiply_add(value, value, squares[part]);
        d += V::lanes;
    };
    while (d + 2 * V::lanes <= dimension) {
        step(0);
        step(1);
    }
    if (d + V::lanes <= dimension) step(0);
    float rest = 0;
    for (; d < dimension; ++d) {
        row[d] = Elements::one(centroid + d * Elements::size) + field_weight<bits>(fields, weights, d);
        rest += row[d] * row[d];
    }
    return V::sum(V::add(squares[0], squares[1])) + rest;
}

template <class V, class Elements>
JMLR_INLINE float add_fields_of(const ResidualFormat& format, const char* centroid, const char* fields, float* row) {
    switch (format.bits) {
        case 1:
            return add_fields<V, Elements, 1>(format, centroid, fields, row);
        case 2:
            return add_fields<V, Elements, 2>(format, centroid, fields, row);
        case 4:
            return add_fields<V, Elements, 4>(format, centroid, fields, row);
        default:
            return add_fields<V, Elements, 8>(format, centroid, fields, row);
    }
}

template <class V>
float decode_residual(const ResidualFormat& format, const void* centroid, const void* fields, float* scratch,
                      void* to) {
    const auto text = static_cast<const char*>(centroid), bytes = static_cast<const char*>(fields);
    float* row = format.row == Row::float32 ? static_cast<float*>(to) : scratch;
    const float squares =
        format.centroid_type == Type::float32   ? add_fields_of<V, Float32Elements<V>>(format, text, bytes, row)
        : format.centroid_type == Type::float16 ? add_fields_of<V, Float16Elements<V>>(format, text, bytes, row)
                                                : add_fields_of<V, Bfloat16Elements<V>>(format, text, bytes, row);
    float factor = 1.0f;
    if (format.normalize) {
        const float norm = __builtin_sqrtf(squares);
        factor = 1.0f / (norm < norm_floor ? norm_floor : norm);  // NaN stays NaN
    }
    const auto from = reinterpret_cast<const char*>(row);
    switch (format.row) {
        case Row::float32:
            return factor;
        case Row::bfloat16:
            rewrite<V, Float32Elements<V>, Bfloat16Row<V>>(from, factor, format.dimension, to);
            break;
        case Row::rounded_to_float16:
            rewrite<V, Float32Elements<V>, RoundedToFloat16Row<V>>(from, factor, format.dimension, to);
            break;
        case Row::rounded_to_bfloat16:
            rewrite<V, Float32Elements<V>, RoundedToBfloat16Row<V>>(from, factor, format.dimension, to);
            break;
    }
    return 1.0f;
}

}  // namespace
}  // namespace jmlr::maxsim::cpu
