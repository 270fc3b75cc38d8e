// MaxSim on CUDA devices of compute capability 9.0: what the host calls, as sm80.h. The fallback is that.
#pragma once

#include <cstdint>

#include "problem.h"

namespace jmlr::maxsim::sm90 {

// Whether the functions below take a problem: 16-bit elements, up to 256 dimensions, not normalised, documents that
// copies of boxes can read (rows at multiples of 16 bytes), and something to multiply.
bool serves(const Problem&, const ForwardOutput&);

int64_t forward_scratch_bytes(const Problem&, const ForwardOutput&, int processors);
void forward(const Problem&, const ForwardOutput&, void* scratch, int processors, void* stream);

// One per element type, each in its own file.
void forward_half(const Problem&, const ForwardOutput&, void* scratch, int processors, void* stream);
void forward_bfloat16(const Problem&, const ForwardOutput&, void* scratch, int processors, void* stream);

}  // namespace jmlr::maxsim::sm90
