// Shifted sparse attention on GPUs of compute capability 9.0, for what `serves` says yes to; sm80.h takes the rest.
// `processors` is how many multiprocessors the current device has, `stream` a cudaStream_t; pointers are those of the
// current device. Throws std::runtime_error with one clear sentence.
#pragma once

#include "problem.h"

namespace jmlr::shifted_attention::sm90 {

// Numbers of 16 bits, boundary "split", heads of at most 256 dimensions in multiples of 8, and q, k and v that copies
// of boxes can read: on 16 bytes, with strides that are multiples of 16 bytes.
bool serves(const Problem& problem);
// Backward, heads of at most 128 dimensions, and the same of the gradients and the output.
bool serves(const BackwardProblem& problem);

// Each type of elements has a file of its own, so that they compile side by side.
void forward_half(const ForwardProblem& problem, int processors, void* stream);
void forward_bfloat16(const ForwardProblem& problem, int processors, void* stream);
void backward_half(const BackwardProblem& problem, int processors, void* stream);
void backward_bfloat16(const BackwardProblem& problem, int processors, void* stream);

inline void forward(const ForwardProblem& problem, int processors, void* stream) {
    return problem.type == Type::float16 ? forward_half(problem, processors, stream)
                                         : forward_bfloat16(problem, processors, stream);
}

inline void backward(const BackwardProblem& problem, int processors, void* stream) {
    return problem.type == Type::float16 ? backward_half(problem, processors, stream)
                                         : backward_bfloat16(problem, processors, stream);
}

}  // namespace jmlr::shifted_attention::sm90
