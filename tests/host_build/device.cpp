// The GPU that the emulated blocks are said to run on, for the host's side of a launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "emulator.h"

namespace emulator {
namespace {

constexpr int kUnasked = 48 * 1024;

thread_local int current = 0;
thread_local int limit = 163 * 1024;
std::mutex mutex;
std::map<std::pair<const void*, int>, int> allowed;  // of a kernel on a device
int64_t asked = 0;

}  // namespace

void set_device(int number, int shared_limit) {
    current = number;
    limit = shared_limit;
}

int device() { return current; }
int shared_limit() { return limit; }

void allow_shared_memory(const void* kernel, int bytes) {
    if (bytes > limit) {
        throw Violation("a kernel asks for " + std::to_string(bytes) + " bytes of shared memory; there are " +
                        std::to_string(limit));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // time for another thread to trust it too early
    std::lock_guard<std::mutex> lock(mutex);
    allowed[{kernel, current}] = bytes;
    ++asked;
}

void check_shared_memory(const void* kernel, int bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = allowed.find({kernel, current});
    int most = found == allowed.end() ? kUnasked : found->second;
    if (bytes > most || bytes > limit) {
        throw Violation("a block takes " + std::to_string(bytes) + " bytes of shared memory; it may have " +
                        std::to_string(most < limit ? most : limit));
    }
}

}  // namespace emulator

namespace host_build {

void bind_device(pybind11::module_& module) {
    pybind11::register_exception<emulator::Violation>(module, "Violation");
    module.def("set_device", &emulator::set_device, pybind11::arg("number") = 0,
               pybind11::arg("shared_limit") = 163 * 1024);
    module.def("times_asked_for_shared_memory", [] { return emulator::asked; });
    module.def("take_products", &emulator::take_products);
}

}  // namespace host_build
