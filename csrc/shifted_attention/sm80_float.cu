#include "sm80.cuh"

namespace jmlr::shifted_attention::sm80 {

void forward_float(const ForwardProblem& problem, void* stream) { forward_of<float>(problem, stream); }
void backward_float(const BackwardProblem& problem, void* stream) { backward_of<float>(problem, stream); }

}  // namespace jmlr::shifted_attention::sm80
