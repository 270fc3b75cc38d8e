#include "sm90_backward_launch.cuh"

namespace jmlr::shifted_attention::sm90 {

void backward_half(const BackwardProblem& problem, int processors, void* stream) {
    backward_of<tiles::Half>(problem, processors, stream);
}

}  // namespace jmlr::shifted_attention::sm90
