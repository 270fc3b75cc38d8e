// Smooth MaxSim on CUDA devices of compute capability 8.0 and later; conventions of sm80.h.
#pragma once

#include "sm80.h"
#include "smooth_problem.h"

namespace jmlr::maxsim::sm80 {

int64_t smooth_forward_scratch_bytes(const Problem&, int processors);
void smooth_forward(const Problem&, const SmoothForwardOutput&, void* scratch, int processors, void* stream);

int64_t smooth_backward_scratch_bytes(const Problem&, int processors);
void smooth_backward(const Problem&, const SmoothBackwardInput&, const SmoothBackwardOutput&, void* scratch,
                     int processors, void* stream);

// No element type matters to it.
void weight_gradient(const Problem&, const SmoothBackwardInput&, float* grad_weights, void* stream);

// One per element type, each in its own file.
void smooth_forward_float(const Problem&, const SmoothForwardOutput&, void* scratch, int processors, void* stream);
void smooth_backward_float(const Problem&, const SmoothBackwardInput&, const SmoothBackwardOutput&, void* scratch,
                           int processors, void* stream);
void smooth_forward_half(const Problem&, const SmoothForwardOutput&, void* scratch, int processors, void* stream);
void smooth_backward_half(const Problem&, const SmoothBackwardInput&, const SmoothBackwardOutput&, void* scratch,
                          int processors, void* stream);
void smooth_forward_bfloat16(const Problem&, const SmoothForwardOutput&, void* scratch, int processors, void* stream);
void smooth_backward_bfloat16(const Problem&, const SmoothBackwardInput&, const SmoothBackwardOutput&, void* scratch,
                              int processors, void* stream);

}  // namespace jmlr::maxsim::sm80
