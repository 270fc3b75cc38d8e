// MaxSim's CUDA kernels over tensors of torch, as csrc/maxsim/torch_cuda.cpp calls them.
#include "../../csrc/maxsim/sm80.h"
#include "maxsim_backward_call.h"

namespace host_build {
namespace {

void forward_call(const py::dict& arguments, const py::dict& outputs, int none, bool marked, int processors,
                  uint64_t seed) {
    Tensors tensors(seed);
    Problem p = problem_of(tensors, arguments);
    ForwardOutput out = forward_output_of(tensors, arguments, outputs, none, marked);
    ScratchMemory scratch(sm80::forward_scratch_bytes(p, out, processors));
    sm80::forward(p, out, scratch.data(), processors, nullptr);
}

void loss_rows_call(const std::string& rule, const py::object& scores, const py::object& target,
                    const py::object& temperatures, const py::object& statistics, uint64_t seed) {
    Tensors tensors(seed);
    TensorArgument own = tensors.input(scores, "scores"), aim = tensors.input(target, "target");
    LossRows rows;
    rows.rule = rule_of(rule);
    rows.query_count = own.sizes[0];
    rows.documents_per_query = own.sizes[1];
    rows.scores = own.as<float>();
    if (rows.rule == Rule::labels) rows.labels = aim.as<int64_t>();
    else rows.teacher = aim.as<float>();
    rows.temperatures = tensors.input(temperatures, "temperatures").as<float>();
    rows.statistics = tensors.output(statistics, "statistics").as<float>();
    sm80::loss_rows(rows, nullptr);
}

}  // namespace

void bind_maxsim(py::module_& module) {
    module.def("maxsim_forward", &forward_call);
    bind_backward<sm80::backward_scratch_bytes, sm80::backward>(module, "maxsim_backward");
    module.def("maxsim_loss_rows", &loss_rows_call);
}

}  // namespace host_build
