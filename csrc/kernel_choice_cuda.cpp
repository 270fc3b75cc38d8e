#include "kernel_choice.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "tensors.h"

namespace jmlr {
namespace {

enum class Choice { automatic, sm80, sm90 };
constexpr const char* kNames[] = {"auto", "sm80", "sm90"};

Choice choice_of(const std::string& name, const char* where) {
    for (int i = 0; i < 3; ++i) {
        if (name == kNames[i]) return Choice(i);
    }
    check(false, where, " is '", name, "': give auto, sm80 or sm90");
    return Choice::automatic;
}

std::atomic<Choice>& chosen() {
    static std::atomic<Choice> choice = [] {
        const char* wanted = std::getenv("JMLR_CUDA_KERNELS");
        return wanted == nullptr || *wanted == 0 ? Choice::automatic : choice_of(wanted, "JMLR_CUDA_KERNELS");
    }();
    return choice;
}

// The previous choice; an empty name changes nothing.
std::string cuda_kernels(std::string name) {
    if (name.empty()) return kNames[int(chosen().load())];
    return kNames[int(chosen().exchange(choice_of(name, "the choice of CUDA kernels")))];
}

int attribute(cudaDeviceAttr which, const char* what) {
    int device = 0, value = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
    check(error == cudaSuccess, "the current device's ", what, ": ", cudaGetErrorString(error));
    return value;
}

bool is_hopper() {
#ifdef JMLR_SM90
    return attribute(cudaDevAttrComputeCapabilityMajor, "compute capability") == 9 &&
           attribute(cudaDevAttrComputeCapabilityMinor, "compute capability") == 0;
#else
    return false;
#endif
}

}  // namespace

bool use_hopper(const char* operation, bool served) {
    const Choice choice = chosen().load();
    if (choice == Choice::sm80) return false;
    const bool hopper = is_hopper();
    if (choice == Choice::sm90) {
        check(hopper, operation,
              ": the kernels for compute capability 9.0 were asked for, but this GPU has another or the "
              "library was built without 90a; choose auto or sm80");
        check(served, operation,
              ": the kernels for compute capability 9.0 do not take this problem (docs/hopper.md lists "
              "what they take); choose auto or sm80");
    }
    return hopper && served;
}

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, "multiprocessors"); }

}  // namespace jmlr

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CompositeExplicitAutograd, library) {
    library.impl("cuda_kernels", TORCH_BOX(&jmlr::cuda_kernels));
}
