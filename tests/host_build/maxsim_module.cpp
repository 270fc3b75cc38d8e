// MaxSim's CUDA kernels over tensors of torch, as csrc/maxsim/torch_cuda.cpp calls them.
#include "../../csrc/maxsim/sm80.h"
#include "tensor_argument.h"

namespace host_build {
namespace {

using namespace jmlr::maxsim;

Type type_of(const TensorArgument& tensor) {
    if (tensor.dtype == "float32") return Type::float32;
    return tensor.dtype == "float16" ? Type::float16 : Type::bfloat16;
}

WinnerCode code_of(const TensorArgument& winners, int none, bool marked) {
    WinnerType type = winners.dtype == "uint8"    ? WinnerType::uint8
                      : winners.dtype == "uint16" ? WinnerType::uint16
                                                  : WinnerType::int32;
    return {type, none, marked};
}

// The problem of a call; its tensors are accessible to kernels from here on.
Problem problem_of(Tensors& tensors, const py::dict& arguments) {
    auto get = [&](const char* name) { return tensors.input(arguments[name], name); };
    TensorArgument queries = get("queries"), documents = get("documents"), query_mask = get("query_mask"),
                   document_mask = get("document_mask"), weights = get("query_weights"), offsets = get("cu_seqlens");
    Problem p;
    p.type = type_of(queries);
    p.candidates = arguments["candidates"].cast<bool>();
    p.max_length = arguments["max_length"].cast<int64_t>();
    p.query_count = queries.sizes[0];
    p.query_length = queries.sizes[1];
    p.dimension = queries.sizes[2];
    p.queries = queries.data;
    p.query_stride = queries.strides[0];
    p.query_token_stride = queries.strides[1];
    p.documents = documents.data;
    size_t axes = documents.sizes.size();
    p.document_token_stride = documents.strides[axes - 2];
    if (offsets.data != nullptr) {
        p.cu_seqlens = offsets.as<int32_t>();
        p.packed_tokens = documents.sizes[0];
        p.documents_per_query = (offsets.sizes[0] - 1) / (p.candidates ? p.query_count : 1);
    } else {
        p.documents_per_query = documents.sizes[axes - 3];
        p.document_length = documents.sizes[axes - 2];
        p.document_stride = documents.strides[axes - 3];
        if (p.candidates) p.document_query_stride = documents.strides[0];
    }
    if (query_mask.data != nullptr) {
        p.query_mask = query_mask.as<uint8_t>();
        p.query_mask_stride = query_mask.strides[0];
        p.query_mask_token_stride = query_mask.strides[1];
    }
    if (document_mask.data != nullptr) {
        size_t last = document_mask.sizes.size() - 1;
        p.document_mask = document_mask.as<uint8_t>();
        p.document_mask_token_stride = document_mask.strides[last];
        if (!p.packed()) p.document_mask_stride = document_mask.strides[last - 1];
        if (!p.packed() && p.candidates) p.document_mask_query_stride = document_mask.strides[0];
    }
    if (weights.data != nullptr) {
        p.query_weights = weights.as<float>();
        p.query_weights_stride = weights.strides[0];
        p.query_weights_token_stride = weights.strides[1];
    }
    return p;
}

struct ScratchMemory {
    explicit ScratchMemory(int64_t bytes) : words(size_t(bytes + 31) / 16 * 2, ~uint64_t(0)) {
        if (bytes > 0) emulator::register_tensor(data(), size_t(bytes), true, "scratch");
    }
    void* data() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(words.data()) + 15) / 16 * 16); }
    std::vector<uint64_t> words;
};

void forward_call(const py::dict& arguments, const py::dict& outputs, int none, bool marked, int processors,
                  uint64_t seed) {
    Tensors tensors(seed);
    Problem p = problem_of(tensors, arguments);
    auto get = [&](const char* name) { return tensors.output(outputs[name], name); };
    TensorArgument scores = get("scores"), winners = get("winners"), query_scales = get("query_scales"),
                   document_scales = get("document_scales");
    ForwardOutput out;
    out.scores = scores.as<float>();
    out.per_token = arguments["per_token"].cast<bool>();
    out.winners = winners.data;
    if (winners.data != nullptr) out.code = code_of(winners, none, marked);
    out.normalize = arguments["normalize"].cast<bool>();
    out.query_scales = query_scales.as<float>();
    out.document_scales = document_scales.as<float>();
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
