// The backward pass of MaxSim on CUDA devices of compute capability 9.0: the counterparts of sm80.h, under its rules.
#pragma once

#include "problem.h"

namespace jmlr::maxsim::sm90 {

// Whether these kernels take a problem: they take what those of sm80.h take.
inline bool serves_backward(const Problem&, const BackwardInput&) { return true; }

int64_t backward_scratch_bytes(const Problem&, const BackwardInput&, int processors);
void backward(const Problem&, const BackwardInput&, const BackwardOutput&, void* scratch, int processors, void* stream);

// One per element type, each in its own file.
void backward_float(const Problem&, const BackwardInput&, const BackwardOutput&, void* scratch, int processors,
                    void* stream);
void backward_half(const Problem&, const BackwardInput&, const BackwardOutput&, void* scratch, int processors,
                   void* stream);
void backward_bfloat16(const Problem&, const BackwardInput&, const BackwardOutput&, void* scratch, int processors,
                       void* stream);

}  // namespace jmlr::maxsim::sm90
