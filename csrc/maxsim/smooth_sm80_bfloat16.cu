#include "smooth_sm80.cuh"

namespace jmlr::maxsim::sm80 {

void smooth_forward_bfloat16(const Problem& p, const SmoothForwardOutput& out, void* scratch, int processors,
                             void* stream) {
    smooth_forward_of<tiles::BFloat16>(p, out, scratch, processors, stream);
}

void smooth_backward_bfloat16(const Problem& p, const SmoothBackwardInput& in, const SmoothBackwardOutput& out,
                              void* scratch, int processors, void* stream) {
    smooth_backward_of<tiles::BFloat16>(p, in, out, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm80
