// The vector type of both AVX-512 instruction sets: needs F, BW, DQ and VL.

#pragma once

// GCC 12 takes its own header's "any value will do" for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>

#include "cpu_smooth_kernels.h"

namespace jmlr::maxsim::cpu {
namespace {

struct Avx512 {
    static constexpr int lanes = 16;
    using Floats = __m512;
    using Integers = __m512i;
    using Mask = __mmask16;

    // Of 32 registers: 24 sums, the query rows and document values.
    static constexpr int tile_tokens(int) { return 12; }

    static JMLR_INLINE Floats zero() { return _mm512_setzero_ps(); }
    static JMLR_INLINE Floats load(const float* at) { return _mm512_load_ps(at); }
    static JMLR_INLINE Floats load_unaligned(const float* at) { return _mm512_loadu_ps(at); }
    static JMLR_INLINE void store(float* at, Floats value) { _mm512_store_ps(at, value); }
    static JMLR_INLINE void store_unaligned(float* at, Floats value) { _mm512_storeu_ps(at, value); }
    static JMLR_INLINE Floats broadcast_float(float value) { return _mm512_set1_ps(value); }
    static JMLR_INLINE Floats broadcast(const char* at) {
        float value;
        std::memcpy(&value, at, 4);
        return _mm512_set1_ps(value);
    }
    static JMLR_INLINE Floats broadcast_half_unit(const char* at) {
        uint16_t value;
        std::memcpy(&value, at, 2);
        return _mm512_castsi512_ps(_mm512_set1_epi32(value));
    }

    static JMLR_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static JMLR_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static JMLR_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static JMLR_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static JMLR_INLINE Floats maximum_or_second(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static JMLR_INLINE Floats minimum_or_second(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static JMLR_INLINE Floats low_bits_as_exponent(Floats a) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23));
    }
    static JMLR_INLINE Mask unordered(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
    static JMLR_INLINE Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
    static JMLR_INLINE Floats nan_where(Mask mask, Floats value) {
        return _mm512_mask_mov_ps(value, mask, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
    }
    static JMLR_INLINE Mask greater_or_first_nan(Floats value, Floats best) {
        const Mask no_nan_yet = _mm512_cmp_ps_mask(best, best, _CMP_ORD_Q);
        return _mm512_mask_cmp_ps_mask(no_nan_yet, value, best, _CMP_NLE_UQ);
    }
    static JMLR_INLINE Mask equal_where(Mask mask, Floats a, Floats b) {
        return _mm512_mask_cmp_ps_mask(mask, a, b, _CMP_EQ_OQ);
    }
    static JMLR_INLINE bool any(Mask mask) { return mask != 0; }
    static JMLR_INLINE Floats select(Mask mask, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, mask, yes); }
    static JMLR_INLINE Integers select(Mask mask, Integers yes, Integers no) {
        return _mm512_mask_mov_epi32(no, mask, yes);
    }
    static JMLR_INLINE Integers broadcast_integer(int32_t value) { return _mm512_set1_epi32(value); }
    static JMLR_INLINE Integers load_integers(const int32_t* at) { return _mm512_load_si512(at); }
    static JMLR_INLINE void store_integers(int32_t* at, Integers value) { _mm512_store_si512(at, value); }

    static JMLR_INLINE __m256i load_two_bytes(const char* at) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    }
    static JMLR_INLINE Floats load_halves(const char* at) { return _mm512_cvtph_ps(load_two_bytes(at)); }
    static JMLR_INLINE Floats load_bfloat16(const char* at) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_two_bytes(at)), 16));
    }
    static JMLR_INLINE void store_halves(char* at, Floats value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
};

}  // namespace
}  // namespace jmlr::maxsim::cpu
