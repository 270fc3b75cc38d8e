// jmlr_native::maxsim_smooth_forward and maxsim_smooth_backward on CPU tensors.

#include "cpu.h"
#include "torch_smooth_problem.h"
#include "torch_threads.h"

namespace jmlr::maxsim {
namespace {

std::tuple<Tensor, Tensor> maxsim_smooth_forward(Tensor queries, Tensor documents, OptionalTensor query_mask,
                                                 OptionalTensor document_mask, OptionalTensor query_weights,
                                                 OptionalTensor cu_seqlens, bool candidates, double temperature,
                                                 bool need_maxima) {
    const auto run = [](const Problem& p, const SmoothForwardOutput& out) {
        cpu::smooth_forward(p, out, torch_threads());
    };
    return smooth_forward_with(run, queries, documents, query_mask, document_mask, query_weights, cu_seqlens,
                               candidates, temperature, need_maxima);
}

std::tuple<Tensor, Tensor, Tensor> maxsim_smooth_backward(Tensor grad_scores, Tensor queries, Tensor documents,
                                                          Tensor maxima, OptionalTensor document_mask,
                                                          OptionalTensor query_weights, OptionalTensor cu_seqlens,
                                                          bool candidates, double temperature) {
    const auto run = [](const Problem& p, const SmoothBackwardInput& in, const SmoothBackwardOutput& out) {
        cpu::smooth_backward(p, in, out, torch_threads());
    };
    return smooth_backward_with(run, grad_scores, queries, documents, maxima, document_mask, query_weights, cu_seqlens,
                                candidates, temperature);
}

}  // namespace
}  // namespace jmlr::maxsim

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CPU, library) {
    library.impl("maxsim_smooth_forward", TORCH_BOX(&jmlr::maxsim::maxsim_smooth_forward));
    library.impl("maxsim_smooth_backward", TORCH_BOX(&jmlr::maxsim::maxsim_smooth_backward));
}
