#include "sm80.h"
#include "sm80_backward.cuh"
#include "sm80_forward.cuh"

namespace jmlr::maxsim::sm80 {

JMLR_SHARED_LAUNCHES(, tiles::BFloat16)

void forward_bfloat16(const Problem& p, const ForwardOutput& out, void* scratch, int processors, void* stream) {
    forward_of<tiles::BFloat16>(p, out, scratch, processors, stream);
}

void backward_bfloat16(const Problem& p, const BackwardInput& in, const BackwardOutput& out, void* scratch,
                       int processors, void* stream) {
    backward_of<tiles::BFloat16>(p, in, out, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm80
