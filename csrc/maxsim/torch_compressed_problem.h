// MaxSim's operations on compressed documents on torch's tensors, less what computes: checks, allocation, and the
// structs of compressed_problem.h. torch_cpu.cpp and torch_cuda.cpp add the kernels.
#pragma once

#include "compressed_problem.h"
#include "torch_problem.h"

namespace jmlr::maxsim {

inline Tensor new_scores(const Tensor& queries, const Problem& p) {
    return new_tensor(queries, {p.query_count, p.documents_per_query}, ScalarType::Float);
}

// The operation maxsim_quantized_forward; `run(problem, documents, scores)` fills the scores.
template <class Run>
Tensor quantized_forward_with(Run run, Tensor queries, Tensor values, Tensor scales, OptionalTensor query_mask,
                              OptionalTensor document_mask, OptionalTensor query_weights, OptionalTensor cu_seqlens,
                              bool candidates) {
    const bool int8 = values.scalar_type() == ScalarType::Char;
    check(int8 || values.scalar_type() == ScalarType::Float8_e4m3fn, "values must be int8 or float8_e4m3fn, but are ",
          name_of(values.scalar_type()));
    const Checked checked =
        check_layout("values", queries, values, query_mask, document_mask, query_weights, cu_seqlens, candidates, 0);
    const Problem& p = checked.problem;
    check_width("values", values, p.dimension);
    check_shape("scales", scales, leading_sizes(values));
    check_dtype("scales", scales, ScalarType::Float);
    check_device("scales", scales, queries);
    const Tensor contiguous_scales = torch::stable::contiguous(scales);
    QuantizedDocuments documents;
    documents.type = int8 ? ValueType::int8 : ValueType::float8_e4m3fn;
    documents.scales = static_cast<const float*>(contiguous_scales.const_data_ptr());
    Tensor scores = new_scores(queries, p);
    run(p, documents, static_cast<float*>(scores.mutable_data_ptr()));
    return scores;
}

// The operation maxsim_residual_forward; `run(problem, documents, scores)` fills the scores.
template <class Run>
Tensor residual_forward_with(Run run, Tensor queries, Tensor codes, Tensor residuals, Tensor centroids,
                             Tensor field_weights, OptionalTensor query_mask, OptionalTensor document_mask,
                             OptionalTensor query_weights, OptionalTensor cu_seqlens, bool normalize, bool candidates) {
    check_dtype("residuals", residuals, ScalarType::Byte);
    const Checked checked = check_layout("residuals", queries, residuals, query_mask, document_mask, query_weights,
                                         cu_seqlens, candidates, 0);
    const Problem& p = checked.problem;
    check_dim("field_weights", field_weights, 1);
    check_dtype("field_weights", field_weights, ScalarType::Float);
    ResidualDocuments documents;
    for (const int bits : {1, 2, 4, 8}) {
        if (field_weights.size(0) == int64_t{1} << bits) documents.bits = bits;
    }
    check(documents.bits > 0, "field_weights must be [2], [4], [16] or [256], but has ", shape_of(field_weights));
    check(p.dimension * documents.bits % 8 == 0, "D=", p.dimension, " times ", documents.bits,
          " bits is no whole number of bytes");
    check_width("residuals", residuals, p.dimension * documents.bits / 8);
    check_shape("codes", codes, leading_sizes(residuals));
    check_dtype("codes", codes, ScalarType::Int);
    check_dim("centroids", centroids, 2);
    check_width("centroids", centroids, p.dimension);
    for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"codes", codes},
                                       {"centroids", centroids},
                                       {"field_weights", field_weights}}) {
        check_device(name, tensor, queries);
    }
    const Tensor contiguous_codes = torch::stable::contiguous(codes), table = with_unit_stride(centroids);
    const Tensor contiguous_weights = torch::stable::contiguous(field_weights);
    documents.normalize = normalize;
    documents.codes = static_cast<const int32_t*>(contiguous_codes.const_data_ptr());
    documents.centroids = table.const_data_ptr();
    documents.centroid_type = type_of<Type>(table);
    documents.centroid_count = table.size(0);
    documents.centroid_stride = table.stride(0);
    documents.field_weights = static_cast<const float*>(contiguous_weights.const_data_ptr());
    Tensor scores = new_scores(queries, p);
    run(p, documents, static_cast<float*>(scores.mutable_data_ptr()));
    return scores;
}

}  // namespace jmlr::maxsim
