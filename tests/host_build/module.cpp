// Every CUDA kernel of csrc/, compiled for the CPU over the emulated block.
#include <pybind11/pybind11.h>

namespace host_build {

void bind_device(pybind11::module_& module);
void bind_tiles(pybind11::module_& module);
void bind_hopper(pybind11::module_& module);
void bind_maxsim(pybind11::module_& module);
void bind_maxsim_compressed(pybind11::module_& module);
void bind_maxsim_sm90_backward(pybind11::module_& module);
void bind_maxsim_sm90_forward(pybind11::module_& module);
void bind_maxsim_smooth(pybind11::module_& module);
void bind_shifted_attention(pybind11::module_& module);
void bind_shifted_attention_sm90(pybind11::module_& module);
void bind_shifted_attention_sm90_backward(pybind11::module_& module);

}  // namespace host_build

PYBIND11_MODULE(jmlr_host_build, module) {
    host_build::bind_device(module);
    host_build::bind_tiles(module);
    host_build::bind_hopper(module);
    host_build::bind_maxsim(module);
    host_build::bind_maxsim_compressed(module);
    host_build::bind_maxsim_sm90_backward(module);
    host_build::bind_maxsim_sm90_forward(module);
    host_build::bind_maxsim_smooth(module);
    host_build::bind_shifted_attention(module);
    host_build::bind_shifted_attention_sm90(module);
    host_build::bind_shifted_attention_sm90_backward(module);
}
