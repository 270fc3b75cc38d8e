// jmlr_native::maxsim_quantized_forward and maxsim_residual_forward on CUDA tensors: on their device, on its current
// stream.

#include "../kernel_choice.h"
#include "sm80.h"
#include "sm80_compressed.h"
#include "torch_compressed_problem.h"

namespace jmlr::maxsim {
namespace {

Tensor maxsim_quantized_forward(Tensor queries, Tensor values, Tensor scales, OptionalTensor query_mask,
                                OptionalTensor document_mask, OptionalTensor query_weights, OptionalTensor cu_seqlens,
                                bool candidates) {
    const OnDeviceOf device(queries);
    const auto run = [&queries](const Problem& p, const QuantizedDocuments& documents, float* scores) {
        const int processors = multiprocessors();
        Tensor scratch = scratch_memory(queries, sm80::compressed_scratch_bytes(p, processors));
        sm80::quantized_forward(p, documents, scores, scratch.mutable_data_ptr(), processors,
                                current_cuda_stream(queries));
    };
    return quantized_forward_with(run, queries, values, scales, query_mask, document_mask, query_weights, cu_seqlens,
                                  candidates);
}

Tensor maxsim_residual_forward(Tensor queries, Tensor codes, Tensor residuals, Tensor centroids, Tensor field_weights,
                               OptionalTensor query_mask, OptionalTensor document_mask, OptionalTensor query_weights,
                               OptionalTensor cu_seqlens, bool normalize, bool candidates) {
    const OnDeviceOf device(queries);
    const auto run = [&queries](const Problem& p, const ResidualDocuments& documents, float* scores) {
        const int processors = multiprocessors();
        Tensor scratch = scratch_memory(queries, sm80::compressed_scratch_bytes(p, processors));
        sm80::residual_forward(p, documents, scores, scratch.mutable_data_ptr(), processors,
                               current_cuda_stream(queries));
    };
    return residual_forward_with(run, queries, codes, residuals, centroids, field_weights, query_mask, document_mask,
                                 query_weights, cu_seqlens, normalize, candidates);
}

}  // namespace
}  // namespace jmlr::maxsim

STABLE_TORCH_LIBRARY_IMPL(JMLR_NAMESPACE, CUDA, library) {
    library.impl("maxsim_quantized_forward", TORCH_BOX(&jmlr::maxsim::maxsim_quantized_forward));
    library.impl("maxsim_residual_forward", TORCH_BOX(&jmlr::maxsim::maxsim_residual_forward));
}
