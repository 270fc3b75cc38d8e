// Smooth MaxSim's CUDA kernels over tensors of torch, as csrc/maxsim/torch_smooth_cuda.cpp calls them.
#include "../../csrc/maxsim/smooth_sm80.h"
#include "maxsim_problem.h"

namespace host_build {
namespace {

void forward_call(const py::dict& arguments, const py::dict& outputs, float temperature, int processors,
                  uint64_t seed) {
    Tensors tensors(seed);
    Problem p = problem_of(tensors, arguments);
    SmoothForwardOutput out;
    out.temperature = temperature;
    out.scores = tensors.output(outputs["scores"], "scores").as<float>();
    out.maxima = tensors.output(outputs["maxima"], "maxima").as<float>();
    ScratchMemory scratch(sm80::smooth_forward_scratch_bytes(p, processors));
    sm80::smooth_forward(p, out, scratch.data(), processors, nullptr);
}

void backward_call(const py::dict& arguments, const py::dict& given, const py::dict& outputs, float temperature,
                   int processors, uint64_t seed) {
    Tensors tensors(seed);
    Problem p = problem_of(tensors, arguments);
    SmoothBackwardInput in;
    in.temperature = temperature;
    in.grad_scores = tensors.input(given["grad_scores"], "grad_scores").as<float>();
    in.maxima = tensors.input(given["maxima"], "maxima").as<float>();
    SmoothBackwardOutput out;
    out.grad_queries = tensors.output(outputs["grad_queries"], "grad_queries").data;
    out.grad_documents = tensors.output(outputs["grad_documents"], "grad_documents").data;
    out.grad_weights = tensors.output(outputs["grad_weights"], "grad_weights").as<float>();
    ScratchMemory scratch(sm80::smooth_backward_scratch_bytes(p, processors));
    sm80::smooth_backward(p, in, out, scratch.data(), processors, nullptr);
}

}  // namespace

void bind_maxsim_smooth(py::module_& module) {
    module.def("maxsim_smooth_forward", &forward_call);
    module.def("maxsim_smooth_backward", &backward_call);
}

}  // namespace host_build
