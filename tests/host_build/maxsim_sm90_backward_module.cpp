// MaxSim's backward pass of compute capability 9.0 over tensors of torch.
#include "../../csrc/maxsim/sm90_backward.h"
#include "maxsim_backward_call.h"

namespace host_build {

void bind_maxsim_sm90_backward(py::module_& module) {
    bind_backward<sm90::backward_scratch_bytes, sm90::backward>(module, "maxsim_sm90_backward");
}

}  // namespace host_build
