// MaxSim against compressed documents on CUDA devices of compute capability 8.0 and later; see sm80.h. Scores are
// float32 [Nq, N].
#pragma once

#include "compressed_problem.h"

namespace jmlr::maxsim::sm80 {

int64_t compressed_scratch_bytes(const Problem&, int processors);
void quantized_forward(const Problem&, const QuantizedDocuments&, float* scores, void* scratch, int processors,
                       void* stream);
void residual_forward(const Problem&, const ResidualDocuments&, float* scores, void* scratch, int processors,
                      void* stream);

// One per element type of the queries, each in its own file.
void quantized_forward_float(const Problem&, const QuantizedDocuments&, float* scores, void* scratch, int processors,
                             void* stream);
void residual_forward_float(const Problem&, const ResidualDocuments&, float* scores, void* scratch, int processors,
                            void* stream);
void quantized_forward_half(const Problem&, const QuantizedDocuments&, float* scores, void* scratch, int processors,
                            void* stream);
void residual_forward_half(const Problem&, const ResidualDocuments&, float* scores, void* scratch, int processors,
                           void* stream);
void quantized_forward_bfloat16(const Problem&, const QuantizedDocuments&, float* scores, void* scratch, int processors,
                                void* stream);
void residual_forward_bfloat16(const Problem&, const ResidualDocuments&, float* scores, void* scratch, int processors,
                               void* stream);

}  // namespace jmlr::maxsim::sm80
