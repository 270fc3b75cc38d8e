#include "sm80.cuh"

namespace jmlr::shifted_attention::sm80 {

void forward_bfloat16(const ForwardProblem& problem, void* stream) { forward_of<tiles::BFloat16>(problem, stream); }
void backward_bfloat16(const BackwardProblem& problem, void* stream) { backward_of<tiles::BFloat16>(problem, stream); }

}  // namespace jmlr::shifted_attention::sm80
