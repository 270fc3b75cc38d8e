// Starts a kernel. A kernel is a struct with `Params` (plain values and pointers), `kThreads`, `kMinBlocks` (blocks
// that shall fit a multiprocessor), `static void run(const Params&)`, and where its blocks share memory,
// `kSharedBytes`. `kCluster` blocks are neighbours that reach each other's shared memory (hopper.h).
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "primitives.h"

namespace tiles {

template <class Kernel, class = void>
inline constexpr int kSharedBytesOf = 0;
template <class Kernel>
inline constexpr int kSharedBytesOf<Kernel, std::void_t<decltype(Kernel::kSharedBytes)>> = Kernel::kSharedBytes;

template <class Kernel, class = void>
inline constexpr int kClusterOf = 1;
template <class Kernel>
inline constexpr int kClusterOf<Kernel, std::void_t<decltype(Kernel::kCluster)>> = Kernel::kCluster;

}  // namespace tiles

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)

#include <cuda_runtime.h>

namespace tiles {

// What the chip has that the code is compiled for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedOfTarget = bytes_of(SharedMemory::small);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kSharedOfTarget = kSharedOfHopper;
#else
constexpr int kSharedOfTarget = bytes_of(SharedMemory::large);
#endif

// The shared memory is a part of the name, where tools/resources.py reads it. What could not start is left empty.
template <class Kernel, int kSharedBytes>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
    if constexpr (kSharedBytes <= kSharedOfTarget) Kernel::run(params);
}

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int current_device() {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "the current device");
    return device;
}

// What a block may ask for, in bytes, on the current device.
inline int shared_limit() {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()),
               "a device's shared memory");
    return bytes;
}

template <class Kernel>
void ask_for_shared_memory() {
    constexpr int kBytes = kSharedBytesOf<Kernel>;
    check_cuda(cudaFuncSetAttribute(kernel_entry<Kernel, kBytes>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
               "shared memory of a kernel");
}

template <class Kernel>
void start(const typename Kernel::Params& params, int64_t blocks, void* stream) {
    constexpr int kBytes = kSharedBytesOf<Kernel>;
    if constexpr (kClusterOf<Kernel> == 1) {
        kernel_entry<Kernel, kBytes>
            <<<unsigned(blocks), Kernel::kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(params);
        check_cuda(cudaGetLastError(), "launch of a kernel");
    } else {
        cudaLaunchAttribute cluster{};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {kClusterOf<Kernel>, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = unsigned(blocks);
        config.blockDim = Kernel::kThreads;
        config.dynamicSmemBytes = kBytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &cluster;
        config.numAttrs = 1;
        check_cuda(cudaLaunchKernelEx(&config, kernel_entry<Kernel, kBytes>, params), "launch of a kernel");
    }
}

}  // namespace tiles

#else

namespace tiles {

template <class Kernel>
inline constexpr char kIdentity = 0;  // its address stands for the kernel

inline int current_device() { return emulator::device(); }
inline int shared_limit() { return emulator::shared_limit(); }

template <class Kernel>
void ask_for_shared_memory() {
    emulator::allow_shared_memory(&kIdentity<Kernel>, kSharedBytesOf<Kernel>);
}

template <class Kernel>
void start(const typename Kernel::Params& params, int64_t blocks, void*) {
    constexpr int kBytes = kSharedBytesOf<Kernel>;
    emulator::check_shared_memory(&kIdentity<Kernel>, kBytes);
    emulator::run_grid([&params] { Kernel::run(params); },
                       {blocks, Kernel::kThreads, kBytes, kClusterOf<Kernel>, Kernel::kMinBlocks});
}

}  // namespace tiles

#endif

namespace tiles {

inline SharedMemory shared_memory_class() { return class_of(shared_limit()); }

// More than 48 KB of shared memory must be asked for, once for each kernel and device. Two threads that ask at the same
// time ask for the same.
template <class Kernel>
void ask_once(int device) {
    static std::atomic<uint64_t> asked{0};  // a bit for each device
    const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
    if (asked.load(std::memory_order_acquire) & bit) return;
    ask_for_shared_memory<Kernel>();
    asked.fetch_or(bit, std::memory_order_release);
}

// On the current device.
template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t blocks, void* stream) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("the problem needs more than 2**31 - 1 blocks: split the batch");
    if constexpr (kSharedBytesOf<Kernel> > kSharedUnasked) ask_once<Kernel>(current_device());
    start<Kernel>(params, blocks, stream);
}

}  // namespace tiles
