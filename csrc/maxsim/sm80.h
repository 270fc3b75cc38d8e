// MaxSim on CUDA devices of compute capability 8.0 and later: what the host calls. Nothing here knows of torch.
//
// Pointers are device memory of the current device; work is queued on `stream` (a cudaStream_t). Scratch memory is the
// caller's: `*_scratch_bytes` says how much, 16-byte aligned, any contents. `processors`, the device's multiprocessors,
// shape how work is divided, never what is computed. Errors are std::runtime_error.
#pragma once

#include <cstdint>

#include "loss_rows.h"
#include "problem.h"

namespace jmlr::maxsim::sm80 {

int64_t forward_scratch_bytes(const Problem&, const ForwardOutput&, int processors);
void forward(const Problem&, const ForwardOutput&, void* scratch, int processors, void* stream);

int64_t backward_scratch_bytes(const Problem&, const BackwardInput&, int processors);
void backward(const Problem&, const BackwardInput&, const BackwardOutput&, void* scratch, int processors, void* stream);

void loss_rows(const LossRows&, void* stream);

// One per element type, each in its own file.
void forward_float(const Problem&, const ForwardOutput&, void* scratch, int processors, void* stream);
void backward_float(const Problem&, const BackwardInput&, const BackwardOutput&, void* scratch, int processors,
                    void* stream);
void forward_half(const Problem&, const ForwardOutput&, void* scratch, int processors, void* stream);
void backward_half(const Problem&, const BackwardInput&, const BackwardOutput&, void* scratch, int processors,
                   void* stream);
void forward_bfloat16(const Problem&, const ForwardOutput&, void* scratch, int processors, void* stream);
void backward_bfloat16(const Problem&, const BackwardInput&, const BackwardOutput&, void* scratch, int processors,
                       void* stream);

}  // namespace jmlr::maxsim::sm80
