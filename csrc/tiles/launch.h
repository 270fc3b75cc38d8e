// Starts a kernel. A kernel is a struct with `Params` (plain values and pointers), `kThreads`, `kMinBlocks` (blocks
// that shall fit a multiprocessor) and `static void run(const Params&)`.
#pragma once

#include <stdexcept>
#include <string>

#include "primitives.h"

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)

#include <cuda_runtime.h>

namespace tiles {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
    Kernel::run(params);
}

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t blocks, int shared_bytes, void* stream) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("the problem needs more than 2**31 - 1 blocks: split the batch");
    if (shared_bytes > 48 * 1024) {
        check_cuda(
            cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
            "shared memory of a kernel");
    }
    kernel_entry<Kernel>
        <<<unsigned(blocks), Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    check_cuda(cudaGetLastError(), "launch of a kernel");
}

}  // namespace tiles

#else

namespace tiles {

template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t blocks, int shared_bytes, void*) {
    emulator::run_grid([&params] { Kernel::run(params); }, blocks, Kernel::kThreads, shared_bytes);
}

}  // namespace tiles

#endif
