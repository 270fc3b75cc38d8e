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
