// The inner loops with AVX-512: compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c.

#include "cpu_vector512.h"

namespace jmlr::maxsim::cpu {

const Instructions& avx512_instructions() {
    static const Instructions set = {"avx512",
                                     Avx512::lanes,
                                     maxima<Avx512, FloatProduct<Avx512>>,
                                     nullptr,
                                     weighted_sum<Avx512>,
                                     dot<Avx512>,
                                     widen<Avx512>,
                                     narrow<Avx512>,
                                     decode_values<Avx512>,
                                     decode_residual<Avx512>,
                                     smooth_instructions<Avx512>()};
    return set;
}

}  // namespace jmlr::maxsim::cpu
