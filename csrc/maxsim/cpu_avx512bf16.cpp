// AVX-512 with its product of bfloat16 pairs: compiled as cpu_avx512.cpp, and with -mavx512bf16.
//
// The product is exact in float32; the instruction adds the pair's two products and then the sum so far with a rounding
// to nearest each, and takes subnormal numbers for zero.

#include "cpu_vector512.h"

namespace jmlr::maxsim::cpu {
namespace {

// Rows for these products alone: the conversion takes subnormal numbers for zero too.
struct Avx512Pairs : Avx512 {
    static JMLR_INLINE void store_bfloat16(char* at, Floats value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(value));
    }
};

struct PairProduct {
    static JMLR_INLINE __m512 add(__m512 sum, __m512 query, __m512 document) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(query), reinterpret_cast<__m512bh>(document));
    }
};

}  // namespace

const Instructions& avx512bf16_instructions() {
    static const Instructions set = {"avx512bf16",
                                     Avx512::lanes,
                                     maxima<Avx512, FloatProduct<Avx512>>,
                                     maxima<Avx512, PairProduct>,
                                     weighted_sum<Avx512>,
                                     dot<Avx512>,
                                     widen<Avx512>,
                                     narrow<Avx512>,
                                     decode_values<Avx512Pairs>,
                                     decode_residual<Avx512Pairs>,
                                     smooth_instructions<Avx512>(similarities<Avx512, PairProduct>)};
    return set;
}

}  // namespace jmlr::maxsim::cpu
