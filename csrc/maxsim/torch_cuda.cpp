// jmlr_native::maxsim_forward and maxsim_backward on CUDA tensors: on their device, on its current stream.

#include "sm80.h"
#include "torch_problem.h"

namespace jmlr::maxsim {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> maxsim_forward(Tensor queries, Tensor documents, OptionalTensor query_mask,
                                                          OptionalTensor document_mask, OptionalTensor query_weights,
                                                          OptionalTensor cu_seqlens, bool candidates, bool normalize,
                                                          bool per_token, bool need_winners, int64_t max_length) {
    const OnDeviceOf device(queries);
    const auto run = [&queries](const Problem& p, const ForwardOutput& out) {
        const int processors = sm80::multiprocessors();
        Tensor scratch = scratch_memory(queries, sm80::forward_scratch_bytes(p, out, processors));
        sm80::forward(p, out, scratch.mutable_data_ptr(), processors, current_cuda_stream(queries));
    };
    return forward_with(run, queries, documents, query_mask, document_mask, query_weights, cu_seqlens, candidates,
                        normalize, per_token, need_winners, max_length);
}

std::tuple<Tensor, Tensor, Tensor> maxsim_backward(std::vector<Tensor> rule_tensors, Tensor queries, Tensor documents,
                                                   Tensor winners, OptionalTensor query_mask,
                                                   OptionalTensor document_mask, OptionalTensor query_weights,
                                                   OptionalTensor cu_seqlens, OptionalTensor query_scales,
                                                   OptionalTensor document_scales, std::string rule, bool candidates,
                                                   int64_t max_length) {
    const OnDeviceOf device(queries);
    const auto run = [&queries](const Problem& p, const BackwardInput& in, const BackwardOutput& out) {
        const int processors = sm80::multiprocessors();
        Tensor scratch = scratch_memory(queries, sm80::backward_scratch_bytes(p, in, processors));
        sm80::backward(p, in, out, scratch.mutable_data_ptr(), processors, current_cuda_stream(queries));
    };
    return backward_with(run, rule_tensors, queries, documents, winners, query_mask, document_mask, query_weights,
                         cu_seqlens, query_scales, document_scales, rule, candidates, max_length);
}

Tensor maxsim_loss_rows(Tensor scores, OptionalTensor target, Tensor temperatures, std::string rule) {
    const OnDeviceOf device(scores);
    const auto run = [&scores](const LossRows& rows) { sm80::loss_rows(rows, current_cuda_stream(scores)); };
    return loss_rows_with(run, scores, target, temperatures, rule);
}

}  // namespace
}  // namespace jmlr::maxsim

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CUDA, library) {
    library.impl("maxsim_forward", TORCH_BOX(&jmlr::maxsim::maxsim_forward));
    library.impl("maxsim_backward", TORCH_BOX(&jmlr::maxsim::maxsim_backward));
    library.impl("maxsim_loss_rows", TORCH_BOX(&jmlr::maxsim::maxsim_loss_rows));
}
