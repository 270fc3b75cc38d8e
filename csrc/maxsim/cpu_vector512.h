// The vector type of both AVX-512 instruction sets: needs F, BW, DQ and VL.

#pragma once

// GCC 12 takes its own header's "any value will do" for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include <immintrin.h>

#include "cpu_decoding.h"
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
    static JMLR_INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a); }
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
    static JMLR_INLINE void store_bfloat16(char* at, Floats value) {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i all = select(unordered(value, value), _mm512_set1_epi32(0x7fc0), _mm512_srli_epi32(up, 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(all));
    }

    static JMLR_INLINE __m128i load_bytes(const char* at) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    }
    static JMLR_INLINE Floats load_int8(const char* at) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(at)));
    }
    static JMLR_INLINE Floats load_float8(const char* at) {
        const __m128i codes = load_bytes(at);
        const __m256i places = _mm256_set1_epi16(static_cast<int16_t>(float8_places));
        const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), places);
        const __m128i magnitude = _mm_and_si128(codes, _mm_set1_epi8(float8_nan));
        return nan_where(_mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(float8_nan)),
                         multiply(_mm512_cvtph_ps(halves), broadcast_float(float8_factor)));
    }
    template <int bits>
    static JMLR_INLINE Floats field_weights(const char* fields, const float* weights, int64_t d) {
        const char* at = fields + d * bits / 8;
        if constexpr (bits == 8) return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(load_bytes(at)), weights, 4);
        uint64_t sixteen = 0;
        std::memcpy(&sixteen, at, 2 * bits);
        // Each lane takes its field's byte and moves the field down. Above a field's bits are others': the weights are
        // repeated so that they do not matter.
        const auto byte = [](int i) { return i * bits / 8; };
        const __m512i bytes =
            _mm512_setr_epi32(byte(0), byte(1), byte(2), byte(3), byte(4), byte(5), byte(6), byte(7), byte(8), byte(9),
                              byte(10), byte(11), byte(12), byte(13), byte(14), byte(15));
        const auto shift = [](int i) { return 8 - bits - i * bits % 8; };
        const __m512i shifts =
            _mm512_setr_epi32(shift(0), shift(1), shift(2), shift(3), shift(4), shift(5), shift(6), shift(7), shift(8),
                              shift(9), shift(10), shift(11), shift(12), shift(13), shift(14), shift(15));
        const __m512i own = _mm512_shuffle_epi8(_mm512_set1_epi64(static_cast<int64_t>(sixteen)), bytes);
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(own, shifts), load(weights));
    }
};

}  // namespace
}  // namespace jmlr::maxsim::cpu
