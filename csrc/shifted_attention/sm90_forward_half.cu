#include "sm90_forward.cuh"

#include "sm90.h"

namespace jmlr::shifted_attention::sm90 {

void forward_half(const ForwardProblem& problem, int processors, void* stream) {
    forward_of<tiles::Half>(problem, processors, stream);
}

}  // namespace jmlr::shifted_attention::sm90
