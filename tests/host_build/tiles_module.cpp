// The tile primitives on their own, and the launch.
#include <exception>
#include <thread>

#include "product.cuh"
#include "tensor_argument.h"

namespace host_build {
namespace {

template <class Element, bool kTransposed>
void run(const TensorArgument& a, const TensorArgument& b, const TensorArgument& c, Fault fault) {
    int64_t depth = a.sizes[kTransposed ? 0 : 1];
    constexpr int kPerChunk = 16 / int(sizeof(Element));
    auto whole = [](const TensorArgument& x) {
        return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.strides[0] % kPerChunk == 0;
    };
    product<Element, kTransposed>({a.as<const Element>(), b.as<const Element>(), c.as<float>(), c.sizes[0], c.sizes[1],
                                   depth, a.strides[0], b.strides[0], whole(a) && whole(b), fault});
}

struct Large {
    static constexpr int kSharedBytes = 64 * 1024;
};

// Many threads launch a kernel for the first time, on several devices at once. Throws where one of them would start it
// before its shared memory has been asked for.
void first_launches(int threads, int devices) {
    std::vector<std::exception_ptr> errors(static_cast<size_t>(threads));
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
        running.emplace_back([i, devices, &error = errors[size_t(i)]] {
            try {
                emulator::set_device(i % devices, bytes_of(tiles::SharedMemory::small));
                tiles::ask_once<Large>(tiles::current_device());
                emulator::check_shared_memory(&tiles::kIdentity<Large>, Large::kSharedBytes);
            } catch (...) {
                error = std::current_exception();
            }
        });
    }
    for (std::thread& thread : running) thread.join();
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
}

}  // namespace

void bind_tiles(py::module_& module) {
    module.def("first_launches", &first_launches);
    module.def(
        "product",
        [](const py::object& a, const py::object& b, const py::object& c, bool transposed, int fault, uint64_t seed) {
            Tensors tensors(seed);
            TensorArgument left = tensors.input(a, "a"), right = tensors.input(b, "b"), out = tensors.output(c, "c");
            auto chosen = [&](auto element) {
                using Element = decltype(element);
                (transposed ? run<Element, true> : run<Element, false>)(left, right, out, Fault(fault));
            };
            if (left.dtype == "float32") chosen(float{});
            else if (left.dtype == "float16") chosen(tiles::Half{});
            else chosen(tiles::BFloat16{});
        },
        py::arg("a"), py::arg("b"), py::arg("c"), py::arg("transposed") = false, py::arg("fault") = 0,
        py::arg("seed") = 0);
}

}  // namespace host_build
