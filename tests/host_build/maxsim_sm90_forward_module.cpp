// MaxSim's forward kernels for compute capability 9.0 over tensors of torch.
#include "../../csrc/maxsim/sm90.h"
#include "maxsim_problem.h"

namespace host_build {
namespace {

// Whether the kernels take the problem; if not, nothing is computed.
bool forward_call(const py::dict& arguments, const py::dict& outputs, int none, bool marked, int processors,
                  uint64_t seed) {
    Tensors tensors(seed);
    Problem p = problem_of(tensors, arguments);
    ForwardOutput out = forward_output_of(tensors, arguments, outputs, none, marked);
    if (!sm90::serves(p, out)) return false;
    ScratchMemory scratch(sm90::forward_scratch_bytes(p, out, processors));
    sm90::forward(p, out, scratch.data(), processors, nullptr);
    return true;
}

}  // namespace

void bind_maxsim_sm90_forward(py::module_& module) { module.def("maxsim_sm90_forward", &forward_call); }

}  // namespace host_build
