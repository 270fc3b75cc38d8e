// jmlr_native::maxsim_forward, maxsim_backward and the forward passes on compressed documents, on CPU tensors.

#include "cpu.h"
#include "torch_compressed_problem.h"
#include "torch_threads.h"

namespace jmlr::maxsim {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> maxsim_forward(Tensor queries, Tensor documents, OptionalTensor query_mask,
                                                          OptionalTensor document_mask, OptionalTensor query_weights,
                                                          OptionalTensor cu_seqlens, bool candidates, bool normalize,
                                                          bool per_token, bool need_winners, int64_t max_length) {
    const auto run = [](const Problem& p, const ForwardOutput& out) { cpu::forward(p, out, torch_threads()); };
    return forward_with(run, queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates,
                        normalize, per_token, need_winners, max_length);
}

std::tuple<Tensor, Tensor, Tensor> maxsim_backward(std::vector<Tensor> rule_tensors, Tensor queries, Tensor documents,
                                                   Tensor winners, OptionalTensor query_mask,
                                                   OptionalTensor document_mask, OptionalTensor query_weights,
                                                   OptionalTensor cu_seqlens, OptionalTensor query_scales,
                                                   OptionalTensor document_scales, std::string rule, bool candidates,
                                                   int64_t max_length) {
    const auto run = [](const Problem& p, const BackwardInput& in, const BackwardOutput& out) {
        cpu::backward(p, in, out, torch_threads());
    };
    return backward_with(run, rule_tensors, queries, documents, winners, query_mask, document_mask, query_weights,
                         cu_seqlens, query_scales, document_scales, rule, candidates, max_length);
}

Tensor maxsim_loss_rows(Tensor scores, OptionalTensor target, Tensor temperatures, std::string rule) {
    const auto run = [](const LossRows& rows) { cpu::loss_rows(rows, torch_threads()); };
    return loss_rows_with(run, scores, target, temperatures, rule);
}

Tensor maxsim_quantized_forward(Tensor queries, Tensor values, Tensor scales, OptionalTensor query_mask,
                                OptionalTensor document_mask, OptionalTensor query_weights, OptionalTensor cu_seqlens,
                                bool candidates) {
    const auto run = [](const Problem& p, const QuantizedDocuments& documents, float* scores) {
        cpu::quantized_forward(p, documents, scores, torch_threads());
    };
    return quantized_forward_with(run, queries, values, scales, query_mask, document_mask, query_weights, cu_seqlens,
                                  candidates);
}

Tensor maxsim_residual_forward(Tensor queries, Tensor codes, Tensor residuals, Tensor centroids, Tensor field_weights,
                               OptionalTensor query_mask, OptionalTensor document_mask, OptionalTensor query_weights,
                               OptionalTensor cu_seqlens, bool normalize, bool candidates) {
    const auto run = [](const Problem& p, const ResidualDocuments& documents, float* scores) {
        cpu::residual_forward(p, documents, scores, torch_threads());
    };
    return residual_forward_with(run, queries, codes, residuals, centroids, field_weights, query_mask, document_mask,
                                 query_weights, cu_seqlens, normalize, candidates);
}

std::string cpu_instructions() { return cpu::instruction_set(); }

}  // namespace
}  // namespace jmlr::maxsim

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CPU, library) {
    library.impl("maxsim_forward", TORCH_BOX(&jmlr::maxsim::maxsim_forward));
    library.impl("maxsim_backward", TORCH_BOX(&jmlr::maxsim::maxsim_backward));
    library.impl("maxsim_loss_rows", TORCH_BOX(&jmlr::maxsim::maxsim_loss_rows));
    library.impl("maxsim_quantized_forward", TORCH_BOX(&jmlr::maxsim::maxsim_quantized_forward));
    library.impl("maxsim_residual_forward", TORCH_BOX(&jmlr::maxsim::maxsim_residual_forward));
}

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CompositeExplicitAutograd, library) {
    library.impl("cpu_instructions", TORCH_BOX(&jmlr::maxsim::cpu_instructions));
}
