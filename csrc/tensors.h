// What torch_cpu.cpp and torch_cuda.cpp of each family share: checks, new tensors, the device and its stream.
//
// Everything is on torch's stable ABI. A failed check throws one sentence, which Python raises as a RuntimeError. The
// public functions in Python check their arguments with more help; these checks keep a direct call of an operation from
// reading memory that is not there.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// Lives in libtorch_cuda: weak, so that the same library loads where torch has no CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace jmlr {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws the sentence that the parts make where `holds` is false.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
    if (holds) {
        return;
    }
    std::ostringstream sentence;
    (sentence << ... << parts);
    throw std::runtime_error(sentence.str());
}

inline const char* name_of(ScalarType type) {
    switch (type) {
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Bool:
            return "bool";
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Char:
            return "int8";
        case ScalarType::UInt16:
            return "uint16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Float8_e4m3fn:
            return "float8_e4m3fn";
        default:
            return "a dtype that these operations do not have";
    }
}

// The family's own name of the elements' type (problem.h).
template <class Type>
Type type_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Type::float32;
        case ScalarType::Half:
            return Type::float16;
        case ScalarType::BFloat16:
            return Type::bfloat16;
        default:
            throw std::runtime_error(std::string("the compiled kernels take float16, bfloat16 and float32, not ") +
                                     name_of(tensor.scalar_type()) + "; use backend='torch'");
    }
}

// The kernels read rows of unit stride where they lie; others are copied. Gradients come as autograd makes them: that
// of a sum is one number with stride 0.
inline Tensor with_unit_stride(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return tensor.size(last) > 1 && tensor.stride(last) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

// "[2, 3, 4]"
inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << '[';
    for (int64_t i = 0; i < tensor.dim(); ++i) {
        text << (i ? ", " : "") << tensor.size(i);
    }
    text << ']';
    return text.str();
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
    check(tensor.dim() == dim, name, " must have ", dim, " dimensions, but its shape is ", shape_of(tensor));
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) {
        same = tensor.size(static_cast<int64_t>(i)) == shape[i];
    }
    if (!same) {
        std::ostringstream wanted;
        for (size_t i = 0; i < shape.size(); ++i) {
            wanted << (i ? ", " : "") << shape[i];
        }
        check(false, name, " must have the shape [", wanted.str(), "], but has ", shape_of(tensor));
    }
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType type) {
    check(tensor.scalar_type() == type, name, " must be ", name_of(type), ", but is ", name_of(tensor.scalar_type()));
}

// The dispatcher chooses by the first tensor on any device; the others must lie there too.
inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
    check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
          " is on another device than the first tensor; move them together");
}

// An unwritten contiguous tensor on the device of `like`.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) {
        strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
    }
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    const torch::stable::Device device = like.device();
    const int32_t device_type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type()));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    dtype, device_type, device.index(), &made));
    return Tensor(made);
}

// The data of a tensor that may be absent: then null.
template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
    return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Makes `like`'s GPU the current one as long as it lives.
class OnDeviceOf {
public:
    explicit OnDeviceOf(const Tensor& like) : guard_(like.get_device_index()) {}

private:
    torch::stable::accelerator::DeviceGuard guard_;
};

// The cudaStream_t that torch has current on `like`'s GPU, as a plain pointer.
inline void* current_cuda_stream(const Tensor& like) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    return stream;
}

}  // namespace jmlr
