// torch tensors as kernel arguments, read through Python attributes: the module needs no torch header.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "emulator.h"

namespace host_build {

namespace py = pybind11;

// A view of a tensor; `tensor` None gives an undefined one. The memory between its first and its last element becomes
// accessible to kernels, and nothing else.
struct TensorArgument {
    void* data = nullptr;
    std::string dtype;
    std::vector<int64_t> sizes, strides;  // in elements

    TensorArgument(const py::object& tensor, const std::string& name, bool writable) {
        if (tensor.is_none()) return;
        data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
        dtype = py::str(tensor.attr("dtype")).cast<std::string>().substr(6);
        for (const py::handle& size : py::tuple(tensor.attr("shape"))) sizes.push_back(size.cast<int64_t>());
        for (const py::handle& stride : py::tuple(tensor.attr("stride")())) strides.push_back(stride.cast<int64_t>());
        int64_t last = 0;
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (sizes[i] == 0) return;
            last += (sizes[i] - 1) * strides[i];
        }
        size_t bytes = size_t(last + 1) * tensor.attr("element_size")().cast<size_t>();
        emulator::register_tensor(data, bytes, writable, name);
    }

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

// Kernels of one call see the tensors of that call.
struct Tensors {
    explicit Tensors(uint64_t seed) {
        emulator::forget_tensors();
        emulator::set_seed(seed);
    }
    ~Tensors() { emulator::forget_tensors(); }

    TensorArgument input(const py::object& tensor, const char* name) { return {tensor, name, false}; }
    TensorArgument output(const py::object& tensor, const char* name) { return {tensor, name, true}; }
};

}  // namespace host_build
