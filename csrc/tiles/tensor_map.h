// Descriptions of tensors in global memory for copy_box and store_box (hopper.h), made on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "hopper.h"

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)
#include "launch.h"
#endif

namespace tiles {

constexpr int kMostAxes = 4;

// Axes from the innermost, which has unit stride, to the outermost. Strides count elements.
struct Axes {
    int count;
    int64_t sizes[kMostAxes];
    int64_t strides[kMostAxes];  // of the first: ignored
    int box[kMostAxes];          // what one copy takes; of the first axis 128 bytes
};

// Whether the copies can read a tensor: what lies on 16 bytes, in sizes of 32 and strides of 40 bits. Strides of axes
// of one element do not matter.
inline bool can_map(const void* data, const Axes& axes, int element_bytes) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
    for (int i = 0; i < axes.count; ++i) {
        if (axes.sizes[i] < 1 || axes.sizes[i] > INT32_MAX) return false;
        int64_t bytes = axes.strides[i] * element_bytes;
        bool usable = bytes > 0 && bytes % 16 == 0 && bytes < int64_t(1) << 40;
        if (i > 0 && axes.sizes[i] > 1 && !usable) return false;
    }
    return true;
}

// In bytes; the innermost axis' is left out.
inline void strides_in_bytes(const Axes& axes, int element_bytes, uint64_t (&strides)[kMostAxes - 1]) {
    for (int i = 1; i < axes.count; ++i)
        strides[i - 1] = axes.sizes[i] > 1 ? uint64_t(axes.strides[i] * element_bytes) : uint64_t(16);
}

#if defined(__CUDACC__) && !defined(JMLR_HOST_BUILD)

namespace wgmma {

// The driver's function, found without linking to the driver: a library with CUDA code loads where there is none.
inline auto tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        check_cuda(error, "cuTensorMapEncodeTiled");
        if (found != cudaDriverEntryPointSuccess || function == nullptr)
            throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: update it to one of CUDA 12 or newer");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return encoder;
}

template <class Element>
constexpr CUtensorMapDataType kMapType = CU_TENSOR_MAP_DATA_TYPE_UINT8;
template <>
inline constexpr CUtensorMapDataType kMapType<Half> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
template <>
inline constexpr CUtensorMapDataType kMapType<BFloat16> = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
template <>
inline constexpr CUtensorMapDataType kMapType<float> = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;

}  // namespace wgmma

// For copies into Panels, whose swizzle they apply, and back. Throws where `can_map` is false.
template <class Element>
TensorMap tensor_map(const Element* data, const Axes& axes) {
    TensorMap result;
    cuuint64_t sizes[kMostAxes] = {}, strides[kMostAxes - 1] = {};
    cuuint32_t box[kMostAxes] = {}, steps[kMostAxes] = {};
    uint64_t bytes[kMostAxes - 1] = {};
    strides_in_bytes(axes, int(sizeof(Element)), bytes);
    for (int i = 0; i < axes.count; ++i) {
        sizes[i] = cuuint64_t(axes.sizes[i]);
        box[i] = cuuint32_t(axes.box[i]);
        steps[i] = 1;
        if (i > 0) strides[i - 1] = bytes[i - 1];
    }
    CUresult error = wgmma::tensor_map_encoder()(&result.map, wgmma::kMapType<Element>, cuuint32_t(axes.count),
                                                 const_cast<Element*>(data), sizes, strides, box, steps,
                                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(error)));
    return result;
}

#else

template <class Element>
TensorMap tensor_map(const Element* data, const Axes& axes) {
    uint64_t bytes[kMostAxes - 1] = {};
    strides_in_bytes(axes, int(sizeof(Element)), bytes);
    return host::tensor_map(data, int(sizeof(Element)), axes.count, axes.sizes, bytes, axes.box);
}

#endif

}  // namespace tiles
