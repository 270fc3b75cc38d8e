#include "sm80.cuh"

namespace jmlr::shifted_attention::sm80 {

void forward_half(const ForwardProblem& problem, void* stream) { forward_of<tiles::Half>(problem, stream); }
void backward_half(const BackwardProblem& problem, void* stream) { backward_of<tiles::Half>(problem, stream); }

}  // namespace jmlr::shifted_attention::sm80
