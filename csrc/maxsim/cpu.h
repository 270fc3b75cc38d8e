// MaxSim on the CPU: forward and backward over plain structs, without torch.
//
// Results do not depend on the number of threads: every output element is computed by one task, in one order.

#pragma once

#include <cstdint>
#include <functional>

#include "compressed_problem.h"
#include "loss_rows.h"

namespace jmlr::maxsim::cpu {

// Whose threads to use: `run` calls its function for every index below `count`, at most `count` at a time.
struct Threads {
    int64_t count = 1;
    std::function<void(int64_t count, const std::function<void(int64_t)>& function)> run;
};

// All throw std::runtime_error, with one sentence, for input whose values do not fit, and std::bad_alloc.
void forward(const Problem& problem, const ForwardOutput& output, const Threads& threads);
void backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output, const Threads& threads);
void quantized_forward(const Problem& problem, const QuantizedDocuments& documents, float* scores,
                       const Threads& threads);
void residual_forward(const Problem& problem, const ResidualDocuments& documents, float* scores,
                      const Threads& threads);

// Throws nothing: all sizes are good.
void loss_rows(const LossRows& rows, const Threads& threads);

// "portable", "avx2", "avx512" or "avx512bf16". Throws where JMLR_CPU_ISA asks for what cannot run.
const char* instruction_set();

}  // namespace jmlr::maxsim::cpu
