// 16-bit floating point as storage, and the few functions of real numbers that kernels need. The GPU converts with its
// own instructions; the host rounds to nearest even by hand, so that it needs no CUDA header.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "platform.h"

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace tiles {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

template <class To, class From>
JMLR_BOTH To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)

JMLR_DEVICE float to_float(float x) { return x; }
JMLR_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
JMLR_DEVICE float to_float(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

template <class Element>
JMLR_DEVICE Element from_float(float x);
template <>
JMLR_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
JMLR_DEVICE Half from_float<Half>(float x) {
    return Half{__half_as_ushort(__float2half_rn(x))};
}
template <>
JMLR_DEVICE BFloat16 from_float<BFloat16>(float x) {
    return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

JMLR_DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
JMLR_DEVICE float log2_accurate(float x) { return log2f(x); }
// NaN if either is: fmaxf alone drops it.
JMLR_DEVICE float maximum_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
// a b + c, rounded once and cut to [0, 1]; zero if it is NaN.
JMLR_DEVICE float multiply_add_cut(float a, float b, float c) {
    float y;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
    return y;
}

#else

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Half x) { return float(bit_cast<_Float16>(x.bits)); }

template <class Element>
inline Element from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline Half from_float<Half>(float x) {
    return Half{bit_cast<uint16_t>(_Float16(x))};
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return BFloat16{uint16_t((bits >> 16) | 0x40)};
    return BFloat16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float log2_accurate(float x) { return std::log2(x); }
inline float maximum_or_nan(float a, float b) { return a != a ? a : b != b ? b : (a < b ? b : a); }
inline float multiply_add_cut(float a, float b, float c) {
    float y = std::fma(a, b, c);
    return y > 0.0f ? (y < 1.0f ? y : 1.0f) : 0.0f;
}

#endif

// Two neighbours of a row in one register, the first in the low half.
template <class Element>
JMLR_DEVICE uint32_t pack(float low, float high) {
    return uint32_t(from_float<Element>(low).bits) | uint32_t(from_float<Element>(high).bits) << 16;
}

// The tensor cores read the upper 19 bits of a float; rounding instead of cutting halves the error.
JMLR_DEVICE uint32_t to_tf32(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace tiles
