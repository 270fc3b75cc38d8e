// Problems of MaxSim over tensors of torch, for the modules of its operations.
#pragma once

#include "../../csrc/maxsim/problem.h"
#include "tensor_argument.h"

namespace host_build {

using namespace jmlr::maxsim;

inline Type type_of(const TensorArgument& tensor) {
    if (tensor.dtype == "float32") return Type::float32;
    return tensor.dtype == "float16" ? Type::float16 : Type::bfloat16;
}

// The problem of a call; its tensors are accessible to kernels from here on.
inline Problem problem_of(Tensors& tensors, const py::dict& arguments) {
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

inline WinnerCode code_of(const TensorArgument& winners, int none, bool marked) {
    WinnerType type = winners.dtype == "uint8"    ? WinnerType::uint8
                      : winners.dtype == "uint16" ? WinnerType::uint16
                                                  : WinnerType::int32;
    return {type, none, marked};
}

inline ForwardOutput forward_output_of(Tensors& tensors, const py::dict& arguments, const py::dict& outputs, int none,
                                       bool marked) {
    auto get = [&](const char* name) { return tensors.output(outputs[name], name); };
    TensorArgument winners = get("winners");
    ForwardOutput out;
    out.scores = get("scores").as<float>();
    out.per_token = arguments["per_token"].cast<bool>();
    out.winners = winners.data;
    if (winners.data != nullptr) out.code = code_of(winners, none, marked);
    out.normalize = arguments["normalize"].cast<bool>();
    out.query_scales = get("query_scales").as<float>();
    out.document_scales = get("document_scales").as<float>();
    return out;
}

struct ScratchMemory {
    explicit ScratchMemory(int64_t bytes) : words(size_t(bytes + 31) / 16 * 2, ~uint64_t(0)) {
        if (bytes > 0) emulator::register_tensor(data(), size_t(bytes), true, "scratch");
    }
    void* data() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(words.data()) + 15) / 16 * 16); }
    std::vector<uint64_t> words;
};

}  // namespace host_build
