// jmlr_native::maxsim_forward and maxsim_backward on CUDA tensors: on their device, on its current stream.

#include "../kernel_choice.h"
#include "sm80.h"
#include "torch_problem.h"
#ifdef JMLR_SM90
#include "sm90.h"
#include "sm90_backward.h"
#endif

namespace jmlr::maxsim {
namespace {

// The kernels that a problem runs with.
struct Forward {
    int64_t (*scratch_bytes)(const Problem&, const ForwardOutput&, int);
    void (*run)(const Problem&, const ForwardOutput&, void*, int, void*);
};
struct Backward {
    int64_t (*scratch_bytes)(const Problem&, const BackwardInput&, int);
    void (*run)(const Problem&, const BackwardInput&, const BackwardOutput&, void*, int, void*);
};

Forward kernels_of(const Problem& p, const ForwardOutput& out) {
#ifdef JMLR_SM90
    if (use_hopper("maxsim", sm90::serves(p, out))) return {sm90::forward_scratch_bytes, sm90::forward};
#else
    (void)p, (void)out, use_hopper("maxsim", false);
#endif
    return {sm80::forward_scratch_bytes, sm80::forward};
}

Backward kernels_of(const Problem& p, const BackwardInput& in) {
#ifdef JMLR_SM90
    if (use_hopper("maxsim", sm90::serves_backward(p, in))) return {sm90::backward_scratch_bytes, sm90::backward};
#else
    (void)p, (void)in, use_hopper("maxsim", false);
#endif
    return {sm80::backward_scratch_bytes, sm80::backward};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> maxsim_forward(Tensor queries, Tensor documents, OptionalTensor query_mask,
                                                          OptionalTensor document_mask, OptionalTensor query_weights,
                                                          OptionalTensor cu_seqlens, bool candidates, bool normalize,
                                                          bool per_token, bool need_winners, int64_t max_length) {
    const OnDeviceOf device(queries);
    const auto run = [&queries](const Problem& p, const ForwardOutput& out) {
        const int processors = multiprocessors();
        const Forward kernels = kernels_of(p, out);
        Tensor scratch = scratch_memory(queries, kernels.scratch_bytes(p, out, processors));
        kernels.run(p, out, scratch.mutable_data_ptr(), processors, current_cuda_stream(queries));
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
        const int processors = multiprocessors();
        const Backward kernels = kernels_of(p, in);
        Tensor scratch = scratch_memory(queries, kernels.scratch_bytes(p, in, processors));
        kernels.run(p, in, out, scratch.mutable_data_ptr(), processors, current_cuda_stream(queries));
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
