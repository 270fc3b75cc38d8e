// One source, two builds. nvcc compiles the kernels for a GPU; with JMLR_HOST_BUILD a host compiler builds the very
// same kernels over an emulated block (tests/host_build/emulator.h), where every memory access is checked.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)
#define JMLR_DEVICE __device__ __forceinline__
#define JMLR_BOTH __host__ __device__ __forceinline__
#define JMLR_UNROLL _Pragma("unroll")
#define JMLR_PRAGMA(text) _Pragma(#text)
#define JMLR_UNROLL_BY(count) JMLR_PRAGMA(unroll(count))
#else
#define JMLR_DEVICE inline
#define JMLR_BOTH inline
#define JMLR_UNROLL
#define JMLR_UNROLL_BY(count)
#endif

namespace tiles {

constexpr int kWarp = 32;

// Shared memory of a block, in bytes: what it has without being asked, and what it may ask for on GPUs of compute
// capability 8.6, 8.9 and 12.x (small), or 8.0, 9.0, 10.x and others with as much (large).
constexpr int kSharedUnasked = 48 * 1024;
enum class SharedMemory { small, large };

// What kernels for compute capability 9.0 alone (hopper.h) may ask for.
constexpr int kSharedOfHopper = 227 * 1024;

constexpr int bytes_of(SharedMemory shared) { return (shared == SharedMemory::small ? 99 : 163) * 1024; }
constexpr SharedMemory class_of(int64_t bytes) {
    return bytes < bytes_of(SharedMemory::large) ? SharedMemory::small : SharedMemory::large;
}

template <class Number>
JMLR_BOTH constexpr Number ceil_div(Number a, Number b) {
    return (a + b - 1) / b;
}

template <class Number>
JMLR_BOTH constexpr Number smaller(Number a, Number b) {
    return a < b ? a : b;
}

template <class Number>
JMLR_BOTH constexpr Number larger(Number a, Number b) {
    return a < b ? b : a;
}

}  // namespace tiles
