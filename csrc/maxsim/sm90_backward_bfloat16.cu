#include "sm90_backward.cuh"
#include "sm90_backward.h"

namespace jmlr::maxsim::sm90 {

void backward_bfloat16(const Problem& p, const BackwardInput& in, const BackwardOutput& out, void* scratch,
                       int processors, void* stream) {
    backward_of<tiles::BFloat16>(p, in, out, scratch, processors, stream);
}

}  // namespace jmlr::maxsim::sm90
