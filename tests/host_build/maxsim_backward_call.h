// The backward pass of MaxSim over tensors of torch, on the kernels of any architecture.
#pragma once

#include "maxsim_problem.h"

namespace host_build {

inline Rule rule_of(const std::string& name) {
    if (name == "scores") return Rule::scores;
    if (name == "tokens") return Rule::tokens;
    if (name == "labels") return Rule::labels;
    return name == "teacher" ? Rule::teacher : Rule::margins;
}

// An architecture's pair of functions.
struct BackwardFunctions {
    int64_t (*scratch_bytes)(const Problem&, const BackwardInput&, int);
    void (*backward)(const Problem&, const BackwardInput&, const BackwardOutput&, void*, int, void*);
};

inline void backward_call(const BackwardFunctions& functions, const py::dict& arguments, const py::dict& given,
                          const py::dict& outputs, int none, bool marked, int processors, uint64_t seed) {
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
    ScratchMemory scratch(functions.scratch_bytes(p, in, processors));
    functions.backward(p, in, out, scratch.data(), processors, nullptr);
}

template <int64_t (*kScratchBytes)(const Problem&, const BackwardInput&, int),
          void (*kBackward)(const Problem&, const BackwardInput&, const BackwardOutput&, void*, int, void*)>
void bind_backward(py::module_& module, const char* name) {
    module.def(name, [](const py::dict& arguments, const py::dict& given, const py::dict& outputs, int none,
                        bool marked, int processors, uint64_t seed) {
        backward_call({kScratchBytes, kBackward}, arguments, given, outputs, none, marked, processors, seed);
    });
}

}  // namespace host_build
