// Which of the compiled CUDA kernels run: those for compute capability 8.0 and later, or those for 9.0 alone.
#pragma once

namespace jmlr {

// Whether an operation shall run the kernels for compute capability 9.0 on the current device. `served`: they can take
// this problem. Throws where they were asked for by name (jmlr_native::cuda_kernels, JMLR_CUDA_KERNELS) and cannot run.
bool use_hopper(const char* operation, bool served);

// Of the current device. Throws where it cannot be asked.
int multiprocessors();

}  // namespace jmlr
