// What smooth MaxSim adds to problem.h: what its forward fills, and what its backward gets besides the Problem.
//
// With t the temperature, m = t * log sum exp(similarity / t) over a document's kept tokens is a query token's smooth
// maximum, and exp((similarity - m) / t) a document token's share of its gradient; docs/maxsim-smooth-and-xtr.md.

#pragma once

#include "problem.h"

namespace jmlr::maxsim {

// All outputs are contiguous.
struct SmoothForwardOutput {
    float temperature = 1.0f;  // 2**-126 or more, so that its inverse is finite
    float* scores = nullptr;   // [Nq, N]
    float* maxima = nullptr;   // [Nq, N, Lq], before weights; -inf where nothing counts; null: not asked for
};

// All inputs are contiguous. The problem has no query mask here: an excluded query token is known by its maxima.
struct SmoothBackwardInput {
    float temperature = 1.0f;
    const float* grad_scores = nullptr;  // [Nq, N]
    const float* maxima = nullptr;       // [Nq, N, Lq] of the forward; -inf: no gradient, whatever the inputs hold
};

// The gradients to fill are those of the hard maximum.
using SmoothBackwardOutput = BackwardOutput;

}  // namespace jmlr::maxsim
