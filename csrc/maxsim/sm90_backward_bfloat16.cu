#include "sm90_backward.cuh"
#include "sm90_backward.h"

namespace jmlr::maxsim {

namespace sm80 {
JMLR_SHARED_LAUNCHES(extern, tiles::BFloat16)
}

namespace sm90 {

void backward_bfloat16(const Problem& p, const BackwardInput& in, const BackwardOutput& out, void* scratch,
                       int processors, void* stream) {
    backward_of<tiles::BFloat16>(p, in, out, scratch, processors, stream);
}

}  // namespace sm90
}  // namespace jmlr::maxsim
