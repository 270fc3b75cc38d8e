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

template <class V>
void decode_values(ValueType type, const void* from, int64_t dimension, float* to) {
    const auto bytes = static_cast<const char*>(from);
    if (type == ValueType::int8) {
        widen_elements<V, Int8Elements<V>>(bytes, dimension, to);
    } else {
        widen_elements<V, Float8Elements<V>>(bytes, dimension, to);
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

template <class V, class Elements, int bits>
void decode_fields(const ResidualToken& token, float* row) {
    const auto centroid = static_cast<const char*>(token.centroid), fields = static_cast<const char*>(token.fields);
    int64_t d = 0;
    for (; d + V::lanes <= token.dimension; d += V::lanes) {
        const auto weight = V::template field_weights<bits>(fields, token.weights, d);
        V::store_unaligned(row + d, V::add(Elements::load(centroid + d * Elements::size), weight));
    }
    for (; d < token.dimension; ++d) {
        row[d] = Elements::one(centroid + d * Elements::size) + field_weight<bits>(fields, token.weights, d);
    }
    if (!token.normalize) return;
    const float norm = __builtin_sqrtf(dot<V>(row, row, token.dimension));
    const float scale = 1.0f / (norm < norm_floor ? norm_floor : norm);  // NaN stays NaN
    d = 0;
    for (; d + V::lanes <= token.dimension; d += V::lanes) {
        V::store_unaligned(row + d, V::multiply(V::load_unaligned(row + d), V::broadcast_float(scale)));
    }
    for (; d < token.dimension; ++d) row[d] *= scale;
}

template <class V, class Elements>
JMLR_INLINE void decode_fields_of(const ResidualToken& token, float* row) {
    switch (token.bits) {
        case 1:
            return decode_fields<V, Elements, 1>(token, row);
        case 2:
            return decode_fields<V, Elements, 2>(token, row);
        case 4:
            return decode_fields<V, Elements, 4>(token, row);
        default:
            return decode_fields<V, Elements, 8>(token, row);
    }
}

template <class V>
void decode_residual(const ResidualToken& token, float* row) {
    switch (token.centroid_type) {
        case Type::float32:
            return decode_fields_of<V, Float32Elements<V>>(token, row);
        case Type::float16:
            return decode_fields_of<V, Float16Elements<V>>(token, row);
        case Type::bfloat16:
            return decode_fields_of<V, Bfloat16Elements<V>>(token, row);
    }
}

}  // namespace
}  // namespace jmlr::maxsim::cpu
