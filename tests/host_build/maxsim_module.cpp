// MaxSim's CUDA kernels over tensors of torch, as csrc/maxsim/torch_cuda.cpp calls them.
#include "../../csrc/maxsim/sm80.h"
#include "maxsim_problem.h"

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

Rule rule_of(const std::string& name) {
    if (name == "scores") return Rule::scores;
    if (name == "tokens") return Rule::tokens;
    if (name == "labels") return Rule::labels;
    return name == "teacher" ? Rule::teacher : Rule::margins;
}

void backward_call(const py::dict& arguments, const py::dict& given, const py::dict& outputs, int none, bool marked,
                   int processors, uint64_t seed) {
    Tensors tensors(seed);
    Problem p = problem_of(tensors, arguments);
    auto get = [&](const char* name) {
        return tensors.input(given.contains(name) ? py::object(given[name]) : py::none(), name);
    };
    BackwardInput in;
    in.rule.rule = rule_of(given["rule"].cast<std::string>());
    in.rule.grad = get("grad").as<float>();
    in.rule.scores = get("scores").as<float>();
    in.rule.row = get("row").as<float>();
    in.rule.temperatures = get("temperatures").as<float>();
    in.rule.labels = get("labels").as<int64_t>();
    in.rule.teacher = get("teacher").as<float>();
    in.rule.teacher_row = get("teacher_row").as<float>();
    TensorArgument winners = get("winners");
    in.winners = winners.data;
    in.code = code_of(winners, none, marked);
    in.query_scales = get("query_scales").as<float>();
    in.document_scales = get("document_scales").as<float>();
    BackwardOutput out;
    out.grad_queries = tensors.output(outputs["grad_queries"], "grad_queries").data;
    out.grad_documents = tensors.output(outputs["grad_documents"], "grad_documents").data;
    out.grad_weights = tensors.output(outputs["grad_weights"], "grad_weights").as<float>();
    ScratchMemory scratch(sm80::backward_scratch_bytes(p, in, processors));
    sm80::backward(p, in, out, scratch.data(), processors, nullptr);
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
    module.def("maxsim_backward", &backward_call);
    module.def("maxsim_loss_rows", &loss_rows_call);
}

}  // namespace host_build
