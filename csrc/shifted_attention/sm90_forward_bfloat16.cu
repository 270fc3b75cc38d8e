#include "sm90_forward.cuh"

#include "sm90.h"

namespace jmlr::shifted_attention::sm90 {

void forward_bfloat16(const ForwardProblem& problem, int processors, void* stream) {
    forward_of<tiles::BFloat16>(problem, processors, stream);
}

}  // namespace jmlr::shifted_attention::sm90
