// The operations of smooth MaxSim on torch's tensors, less what computes: as torch_problem.h, which they build on.

#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "smooth_problem.h"
#include "torch_problem.h"

namespace jmlr::maxsim {

// Below float32's smallest normal number 1 / temperature would be infinite.
inline float checked_temperature(double temperature) {
    check(temperature >= std::numeric_limits<float>::min() && temperature <= std::numeric_limits<float>::max(),
          "temperature=", temperature, " must be positive, finite and a normal float32");
    return static_cast<float>(temperature);
}

// The operation maxsim_smooth_forward; `run` takes its problem and the outputs to fill.
template <class Run>
std::tuple<Tensor, Tensor> smooth_forward_with(Run run, Tensor queries, Tensor documents, OptionalTensor query_mask,
                                               OptionalTensor document_mask, OptionalTensor query_weights,
                                               OptionalTensor cu_seqlens, bool candidates, double temperature,
                                               bool need_maxima) {
    const Checked checked =
        check_problem(queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates, 0);
    const Problem& p = checked.problem;
    SmoothForwardOutput out;
    out.temperature = checked_temperature(temperature);
    const std::vector<int64_t> maxima_sizes = {p.query_count, p.documents_per_query, p.query_length}, none = {0};
    Tensor scores = new_tensor(queries, {p.query_count, p.documents_per_query}, ScalarType::Float);
    Tensor maxima = new_tensor(queries, need_maxima ? maxima_sizes : none, ScalarType::Float);
    out.scores = static_cast<float*>(scores.mutable_data_ptr());
    out.maxima = need_maxima ? static_cast<float*>(maxima.mutable_data_ptr()) : nullptr;
    run(p, out);
    return {scores, maxima};
}

// The operation maxsim_smooth_backward; `run` takes its problem, what the forward saved and the gradients to fill.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> smooth_backward_with(Run run, Tensor grad_scores, Tensor queries, Tensor documents,
                                                        Tensor maxima, OptionalTensor document_mask,
                                                        OptionalTensor query_weights, OptionalTensor cu_seqlens,
                                                        bool candidates, double temperature) {
    const Checked checked =
        check_problem(queries, documents, std::nullopt, document_mask, query_weights, cu_seqlens, candidates, 0);
    const Problem& p = checked.problem;
    check_shape("grad_scores", grad_scores, {p.query_count, p.documents_per_query});
    check_device("grad_scores", grad_scores, queries);
    check_shape("maxima", maxima, {p.query_count, p.documents_per_query, p.query_length});
    check_dtype("maxima", maxima, ScalarType::Float);
    check_device("maxima", maxima, queries);
    const Tensor grads = contiguous_as(grad_scores, ScalarType::Float), saved = torch::stable::contiguous(maxima);
    SmoothBackwardInput in;
    in.temperature = checked_temperature(temperature);
    in.grad_scores = static_cast<const float*>(grads.const_data_ptr());
    in.maxima = static_cast<const float*>(saved.const_data_ptr());
    return fill_gradients<SmoothBackwardOutput>(queries, documents, query_weights,
                                                [&](const auto& out) { run(p, in, out); });
}

}  // namespace jmlr::maxsim
