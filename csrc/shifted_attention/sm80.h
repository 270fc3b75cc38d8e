// Shifted sparse attention on GPUs of compute capability 8.0 and later. `stream` is a cudaStream_t; pointers are those
// of the current device. Throws std::runtime_error with one clear sentence.
#pragma once

#include "problem.h"
#include "tile_sizes.h"

namespace jmlr::shifted_attention::sm80 {

// Each type of elements has a file of its own, so that they compile side by side.
void forward_half(const ForwardProblem& problem, void* stream);
void forward_bfloat16(const ForwardProblem& problem, void* stream);
void forward_float(const ForwardProblem& problem, void* stream);
void backward_half(const BackwardProblem& problem, void* stream);
void backward_bfloat16(const BackwardProblem& problem, void* stream);
void backward_float(const BackwardProblem& problem, void* stream);

inline void forward(const ForwardProblem& problem, void* stream) {
    switch (problem.type) {
        case Type::float16:
            return forward_half(problem, stream);
        case Type::bfloat16:
            return forward_bfloat16(problem, stream);
        case Type::float32:
            return forward_float(problem, stream);
    }
}

inline void backward(const BackwardProblem& problem, void* stream) {
    switch (problem.type) {
        case Type::float16:
            return backward_half(problem, stream);
        case Type::bfloat16:
            return backward_bfloat16(problem, stream);
        case Type::float32:
            return backward_float(problem, stream);
    }
}

}  // namespace jmlr::shifted_attention::sm80
