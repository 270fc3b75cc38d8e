// jmlr_native::maxsim_smooth_forward and maxsim_smooth_backward on CUDA tensors: on their device, on its current
// stream.

#include "../kernel_choice.h"
#include "smooth_sm80.h"
#include "torch_smooth_problem.h"

namespace jmlr::maxsim {
namespace {

std::tuple<Tensor, Tensor> maxsim_smooth_forward(Tensor queries, Tensor documents, OptionalTensor query_mask,
                                                 OptionalTensor document_mask, OptionalTensor query_weights,
                                                 OptionalTensor cu_seqlens, bool candidates, double temperature,
                                                 bool need_maxima) {
    const OnDeviceOf device(queries);
    const auto run = [&queries](const Problem& p, const SmoothForwardOutput& out) {
        const int processors = multiprocessors();
        Tensor scratch = scratch_memory(queries, sm80::smooth_forward_scratch_bytes(p, processors));
        sm80::smooth_forward(p, out, scratch.mutable_data_ptr(), processors, current_cuda_stream(queries));
    };
    return smooth_forward_with(run, queries, documents, query_mask, document_mask, query_weights, cu_seqlens,
                               candidates, temperature, need_maxima);
}

std::tuple<Tensor, Tensor, Tensor> maxsim_smooth_backward(Tensor grad_scores, Tensor queries, Tensor documents,
                                                          Tensor maxima, OptionalTensor document_mask,
                                                          OptionalTensor query_weights, OptionalTensor cu_seqlens,
                                                          bool candidates, double temperature) {
    const OnDeviceOf device(queries);
    const auto run = [&queries](const Problem& p, const SmoothBackwardInput& in, const SmoothBackwardOutput& out) {
        const int processors = multiprocessors();
        Tensor scratch = scratch_memory(queries, sm80::smooth_backward_scratch_bytes(p, processors));
        sm80::smooth_backward(p, in, out, scratch.mutable_data_ptr(), processors, current_cuda_stream(queries));
    };
    return smooth_backward_with(run, grad_scores, queries, documents, maxima, document_mask, query_weights, cu_seqlens,
                                candidates, temperature);
}

}  // namespace
}  // namespace jmlr::maxsim

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CUDA, library) {
    library.impl("maxsim_smooth_forward", TORCH_BOX(&jmlr::maxsim::maxsim_smooth_forward));
    library.impl("maxsim_smooth_backward", TORCH_BOX(&jmlr::maxsim::maxsim_smooth_backward));
}
