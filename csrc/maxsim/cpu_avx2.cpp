// The inner loops with AVX2, FMA and F16C: compiled with -mavx2 -mfma -mf16c, run where the processor has all three.

#include "cpu_decoding.h"
#include "cpu_smooth_kernels.h"

#include <immintrin.h>

namespace jmlr::maxsim::cpu {
namespace {

struct Avx2 {
    static constexpr int lanes = 8;
    using Floats = __m256;
    using Integers = __m256i;
    using Mask = __m256;

    // Of 16 registers: 12 sums, the query rows and a document value.
    static constexpr int tile_tokens(int vectors) { return 12 / vectors; }

    static JMLR_INLINE Floats zero() { return _mm256_setzero_ps(); }
    static JMLR_INLINE Floats load(const float* at) { return _mm256_load_ps(at); }
    static JMLR_INLINE Floats load_unaligned(const float* at) { return _mm256_loadu_ps(at); }
    static JMLR_INLINE void store(float* at, Floats value) { _mm256_store_ps(at, value); }
    static JMLR_INLINE void store_unaligned(float* at, Floats value) { _mm256_storeu_ps(at, value); }
    static JMLR_INLINE Floats broadcast_float(float value) { return _mm256_set1_ps(value); }
    static JMLR_INLINE Floats broadcast(const char* at) {
        float value;
        std::memcpy(&value, at, 4);
        return _mm256_set1_ps(value);
    }
    static JMLR_INLINE Floats broadcast_half_unit(const char*) { return zero(); }  // units are floats here

    static JMLR_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static JMLR_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static JMLR_INLINE float sum(Floats a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static JMLR_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static JMLR_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static JMLR_INLINE Floats maximum_or_second(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static JMLR_INLINE Floats minimum_or_second(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static JMLR_INLINE Floats low_bits_as_exponent(Floats a) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
    }
    static JMLR_INLINE Mask unordered(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
    static JMLR_INLINE Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
    static JMLR_INLINE Floats nan_where(Mask mask, Floats value) { return _mm256_or_ps(mask, value); }
    static JMLR_INLINE Mask greater_or_first_nan(Floats value, Floats best) {
        const Mask not_below = _mm256_cmp_ps(value, best, _CMP_NLE_UQ);
        return _mm256_and_ps(not_below, _mm256_cmp_ps(best, best, _CMP_ORD_Q));
    }
    static JMLR_INLINE Mask equal_where(Mask mask, Floats a, Floats b) {
        return _mm256_and_ps(mask, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
    }
    static JMLR_INLINE bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }
    static JMLR_INLINE Floats select(Mask mask, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, mask); }
    static JMLR_INLINE Integers select(Mask mask, Integers yes, Integers no) {
        return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(mask));
    }
    static JMLR_INLINE Integers broadcast_integer(int32_t value) { return _mm256_set1_epi32(value); }
    static JMLR_INLINE Integers load_integers(const int32_t* at) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
    }
    static JMLR_INLINE void store_integers(int32_t* at, Integers value) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(at), value);
    }

    static JMLR_INLINE __m128i load_two_bytes(const char* at) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    }
    static JMLR_INLINE Floats load_halves(const char* at) { return _mm256_cvtph_ps(load_two_bytes(at)); }
    static JMLR_INLINE Floats load_bfloat16(const char* at) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_two_bytes(at)), 16));
    }
    static JMLR_INLINE void store_halves(char* at, Floats value) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
    static JMLR_INLINE void store_bfloat16(char* at, Floats value) {
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(unordered(value, value));
        const __m256i all = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                         _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    }

    static JMLR_INLINE __m128i load_bytes(const char* at) {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    }
    static JMLR_INLINE Floats load_int8(const char* at) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_bytes(at)));
    }
    static JMLR_INLINE Floats load_float8(const char* at) {
        const __m128i codes = load_bytes(at);
        const __m128i places = _mm_set1_epi16(static_cast<int16_t>(float8_places));
        const __m128i halves = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7), places);
        const __m128i magnitude = _mm_and_si128(codes, _mm_set1_epi8(float8_nan));
        const __m128i nan = _mm_cmpeq_epi8(magnitude, _mm_set1_epi8(float8_nan));
        return nan_where(_mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan)),
                         multiply(_mm256_cvtph_ps(halves), broadcast_float(float8_factor)));
    }
    template <int bits>
    static JMLR_INLINE Floats field_weights(const char* fields, const float* weights, int64_t d) {
        const char* at = fields + d * bits / 8;
        if constexpr (bits == 8) return _mm256_i32gather_ps(weights, _mm256_cvtepu8_epi32(load_bytes(at)), 4);
        uint32_t eight = 0;
        std::memcpy(&eight, at, bits);
        // Above a field's bits are others': the weights are repeated so that they do not matter.
        const __m256i shifts =
            _mm256_setr_epi32(field_shift<bits>(0), field_shift<bits>(1), field_shift<bits>(2), field_shift<bits>(3),
                              field_shift<bits>(4), field_shift<bits>(5), field_shift<bits>(6), field_shift<bits>(7));
        const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(eight)), shifts);
        const Floats first = _mm256_permutevar8x32_ps(load(weights), index);
        if constexpr (bits < 4) return first;
        const Floats second = _mm256_permutevar8x32_ps(load(weights + 8), index);
        return _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
};

}  // namespace

const Instructions& avx2_instructions() {
    static const Instructions set = {"avx2",
                                     Avx2::lanes,
                                     maxima<Avx2, FloatProduct<Avx2>>,
                                     nullptr,
                                     weighted_sum<Avx2>,
                                     dot<Avx2>,
                                     widen<Avx2>,
                                     narrow<Avx2>,
                                     decode_values<Avx2>,
                                     decode_residual<Avx2>,
                                     smooth_instructions<Avx2>()};
    return set;
}

}  // namespace jmlr::maxsim::cpu
